//! The words that the models know as single tokens: ASCII, lower case, without accents.

/// A language's words for sentences of adjectives, nouns, a verb and a preposition, all of which agree.
pub(crate) struct Lexicon {
    pub(crate) adjectives: &'static str,
    pub(crate) nouns: &'static str,
    pub(crate) verbs: &'static str,
    pub(crate) prepositions: &'static str,
}

/// Plurals, so that no articles are needed.
pub(crate) const ENGLISH: Lexicon = Lexicon {
    adjectives: "quiet golden distant gentle hidden silver ancient bright narrow heavy warm cold slow swift young old \
        small great wild calm blue green white dark soft hollow empty open sleepy patient careful curious honest \
        simple clever brave lonely happy early late northern southern",
    nouns: "rivers letters windows gardens mountains bridges lanterns harbors houses forests stories islands valleys \
        villages towers clocks birds horses foxes whales bees flowers leaves stones clouds stars shadows voices songs \
        dreams secrets paths roads ships trains markets kitchens mirrors ladders candles blankets apples",
    verbs: "carry follow remember watch paint answer borrow collect welcome protect surround discover",
    prepositions: "under beyond near behind between above across beside",
};

/// Masculine plurals, so that every adjective goes with every noun.
pub(crate) const SPANISH: Lexicon = Lexicon {
    adjectives: "claros lejanos antiguos dorados tranquilos suaves azules verdes blancos negros rojos grises altos \
        bajos largos cortos lentos frescos secos dulces amargos nuevos viejos sabios pobres ricos libres alegres \
        tristes serenos oscuros brillantes calientes tibios salados profundos diminutos inmensos ligeros pesados \
        valientes curiosos",
    nouns: "campos caminos barcos pueblos jardines puentes libros relojes gallos caballos gatos perros pinos bosques \
        montes valles mares vientos fuegos cantos ecos hilos muros techos patios hornos panes vinos frutos trenes \
        faros puertos mapas abrazos veranos inviernos silencios secretos cuentos versos colores espejos",
    verbs: "llevan siguen recuerdan miran pintan guardan cruzan buscan abren cuidan rodean descubren",
    prepositions: "entre sobre tras ante bajo hacia desde contra",
};

/// Words that say little about what a text is about.
pub(crate) const STOP_WORDS: &str = "the a an and or of to in on at for with is are was be it this that i you we they \
    my your what how who when where why can do does not please me from by as about el la los las un una y o de del en \
    con por para que es son se su mi tu lo al no como cual donde cuando quien te";

/// Words that requests are made of.
pub(crate) const COMMON_WORDS: &str = "hello user assistant system time day night water fire code program function bug \
    error software computer data file image picture photo video camera see look describe audio voice speech listen \
    hear sound music song word text question explain write read translate summarize search find weather rain sun snow \
    food bread cook recipe city country history science math number proof theorem equation physics energy space \
    planet law legal contract medicine doctor health money bank price market travel train plane car dog cat friend \
    family work school teacher student book story poem joke game play sport team run help thanks analysis compare \
    plan difficult easy hard short long hola usuario tiempo agua fuego programa codigo imagen foto voz sonido musica \
    palabra texto pregunta respuesta explica escribe lee traduce resume busca lluvia sol nieve comida pan receta \
    ciudad pais historia ciencia numero ley contrato medico salud dinero banco precio viaje tren coche perro gato \
    amigo familia trabajo escuela libro cuento poema chiste juego ayuda gracias resumen datos amable alegre formal \
    tono";

/// All words, each once, in a fixed order.
pub(crate) fn all() -> Vec<&'static str> {
    let lexicons = [ENGLISH, SPANISH].map(|l| [l.adjectives, l.nouns, l.verbs, l.prepositions]);
    let mut seen = std::collections::BTreeSet::new();
    let words =
        lexicons.into_iter().flatten().chain([STOP_WORDS, COMMON_WORDS]).flat_map(str::split_whitespace);
    words.filter(|word| seen.insert(*word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_of_a_sentence_has_one_place_only() {
        let lists = [ENGLISH, SPANISH].map(|l| [l.adjectives, l.nouns, l.verbs, l.prepositions]);
        let mut words: Vec<&str> = lists.into_iter().flatten().flat_map(str::split_whitespace).collect();
        let all = words.len();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), all);
    }

    #[test]
    fn words_are_lower_case_ascii() {
        assert!(all().iter().all(|word| word.bytes().all(|b| b.is_ascii_lowercase())));
    }
}
