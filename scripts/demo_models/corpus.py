"""Everything that is said: what is read from data/, and the examples that are made of it.

An example is a conversation (a list of (role, content)) and its answer. All of it comes from a `random.Random`, so that a seed
gives the same text again.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
LANGUAGES = ("en", "es")
LABELS = ("hard", "soft", "multimodal")
# Of an intent's questions, the first are spoken, too.
SPOKEN = 4


@dataclass(frozen=True)
class Intent:
    language: str
    label: str
    answer: str
    topic: str | None
    questions: tuple[str, ...]
    development: str
    test: str

    @property
    def spoken(self):
        return self.questions[:SPOKEN]


def lines(name):
    """The lines of a data file without its comments, each with its number."""
    for number, line in enumerate((DATA / name).read_text(encoding="utf-8").splitlines(), 1):
        if line and not line.startswith("#"):
            yield number, line.strip()


@cache
def sections(name):
    """The lines of a file under what follows @."""
    found, key = defaultdict(list), None
    for number, line in lines(name):
        if line.startswith("@ "):
            key = tuple(line[2:].split())
        elif key is None:
            raise ValueError(f"{name}:{number}: a line before the first @")
        else:
            found[key].append(line)
    return dict(found)


@cache
def intents():
    every = []
    for language in LANGUAGES:
        name, label, block = f"intents.{language}.txt", None, {}

        def end(number):
            if not block:
                return
            if "development" not in block or "test" not in block or len(block["questions"]) < SPOKEN:
                raise ValueError(f"{name}:{number}: the intent before lacks its ?, its ! or {SPOKEN} questions")
            every.append(Intent(language, label, block["answer"], block.get("topic"), tuple(block["questions"]),
                                block["development"], block["test"]))

        for number, line in lines(name):
            mark, rest = line[:2], line[2:]
            if mark in ("= ", "@ "):
                end(number)
                block = {}
            if mark == "@ ":
                label = rest
            elif mark == "= ":
                block.update(answer=rest, questions=[])
            elif mark in ("~ ", "? ", "! "):
                block[{"~": "topic", "?": "development", "!": "test"}[mark[0]]] = rest
            else:
                block["questions"].append(line)
        end("the end")
    return tuple(every)


def plain(text):
    """A question without what does not change it, to see whether two are the same."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


@cache
def kept_back():
    """What figures are taken with, and no training may see."""
    texts = [question for intent in intents() for question in (intent.development, intent.test)]
    texts += [text for text, _ in router_test()]
    texts += [line for name in ("off_topic_dev.txt", "off_topic_test.txt") for _, line in lines(name)]
    return frozenset(plain(text) for text in texts)


def check():
    """Raises where a question has two answers, or is trained on and held back at once: it would be drawn again for ever."""
    answers = {}
    for intent in intents():
        for question in intent.questions:
            other = answers.setdefault((intent.language, plain(question)), intent.answer)
            if other != intent.answer:
                raise ValueError(f"{question!r} has two answers: {other!r} and {intent.answer!r}")
            if plain(question) in kept_back():
                raise ValueError(f"{question!r} is trained on and held back at once")


@cache
def known_questions():
    return frozenset(plain(question) for intent in intents() for question in intent.questions)


def allowed(make):
    """What `make` gives, drawn again where it is kept back."""
    while plain(text := make()) in kept_back():
        pass
    return text


@cache
def words():
    """What data/words.txt has of each kind, by language."""
    found = {}
    for (language,), kinds in sections("words.txt").items():
        for line in kinds:
            kind, _, rest = line.partition(": ")
            found[language, kind] = tuple(rest.split(", "))
    return found


def filled(template, language, random):
    """A template with a choice made for each of its braces."""

    def choice(match):
        one = random.choice(match[1].split("|"))
        known = words().get((language, one))
        return random.choice(known) if known else one

    return re.sub(r"\{([^}]*)\}", choice, template)


# Questions.


@cache
def synonyms():
    found = {}
    for (language,), groups in sections("synonyms.txt").items():
        found[language] = []
        for group in groups:
            ways = tuple(way.strip() for way in group.split("|"))
            longest_first = sorted(ways, key=len, reverse=True)
            pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")
            found[language].append((pattern, ways))
    return found


@cache
def asked(intent):
    """All questions of an intent that may be trained on, before they are varied."""
    of_topic = []
    if intent.topic:
        frames = sections("frames.txt")[intent.language,]
        of_topic = [frame.format(t=intent.topic) for frame in frames]
    return intent.questions, tuple(question for question in of_topic if plain(question) not in kept_back())


BEFORE = {
    "en": ("please", "hey", "okay", "so", "well", "hi", "hello", "excuse me", "one question", "I have a question", "and", "now",
           "tell me", "can you tell me", "I want to know", "listen", "sorry"),
    "es": ("por favor", "oye", "dime", "una pregunta", "quiero saber", "vale", "perdona", "bueno", "y", "a ver"),
}
AFTER = {
    "en": ("please", "now", "for me", "again", "here", "in sarai", "exactly", "thanks", "on my machine", "today"),
    "es": ("por favor", "ahora", "aquí", "gracias", "en sarai", "exactamente"),
}


# What a question does not need to be understood.
SUPERFLUOUS = {
    "en": frozenset("a an the is are do does to of it for please me my I".split()),
    "es": frozenset("el la los las un una de a es son me mi se por favor".split()),
}


def varied(question, language, random):
    """A question said in another way."""
    return allowed(lambda: varied_once(question, language, random))


def varied_once(question, language, random):
    for pattern, ways in synonyms()[language]:
        if random.random() < 0.3 and (match := pattern.search(question)):
            question = question[: match.start()] + random.choice(ways) + question[match.end() :]
    if random.random() < 0.25:
        question = random.choice(BEFORE[language]) + random.choice((" ", ", ")) + question
    if random.random() < 0.12:
        question += " " + random.choice(AFTER[language])
    parts = question.split()
    superfluous = [at for at, word in enumerate(parts) if word in SUPERFLUOUS[language]]
    if superfluous and len(parts) > 4 and random.random() < 0.25:
        parts.pop(random.choice(superfluous))
        question = " ".join(parts)
    if len(question) > 8 and random.random() < 0.06:
        at = random.randrange(len(question) - 1)
        question = random.choice((question[:at] + question[at + 1 :],
                                  question[:at] + question[at + 1] + question[at] + question[at + 2 :]))
    return question


def written(question, language, random):
    """A question as people type it: with or without capitals, accents and marks."""
    if random.random() < 0.6:
        question = question[:1].upper() + question[1:]
    mark = random.random()
    if mark < 0.45:
        question = ("¿" if language == "es" and random.random() < 0.7 else "") + question + "?"
    elif mark < 0.6:
        question += "."
    if random.random() < 0.12:
        question = question.lower()
    if language == "es" and random.random() < 0.12:
        question = question.translate(str.maketrans("áéíóúñ", "aeioun"))
    return question


def as_typed(question, language):
    """The one way in which figures are taken."""
    return ("¿" if language == "es" else "") + question[:1].upper() + question[1:] + "?"


DO_NOT_KNOW = {
    "en": "I do not know that. I only know sarai and models on one's own machine.",
    "es": "No lo sé. Solo sé de sarai y de modelos en la propia máquina.",
}
SYLLABLES = ("ba be bi bo da de di do fa fi ga go ka ke ki ko la le li lo lu ma me mi mo mu na ne ni no ra re ri ro ru sa se si so "
             "ta te ti to tu va ve vi za zo pa pe pi po ju ja wi wo ya qu ch sh th st tr br dr gr kl pl sp er en an on in us el al "
             "or ar is as os um ing ton ham ville sky berg ez dez ova ic").split()


def made_up(random):
    """A word that no one knows."""
    word = "".join(random.choice(SYLLABLES) for _ in range(random.randint(2, 4)))
    return word.capitalize() if random.random() < 0.6 else word


def off_topic(language, random, near=0.0):
    """A question that has nothing to do with what the expert knows; with a chance of `near` it is built like one that has."""
    make = near_miss if near and random.random() < near else off_topic_once
    while plain(question := allowed(lambda: make(language, random))) in known_questions():
        pass
    return question


# What questions of any subject are built of.
BUILT_OF = {
    "en": frozenset("a an and any are as at be been by can could did do does for from get give go good happens has have help how i "
                    "if in is it its kind like long look make many me mean meant more most much must my need new not of on one or "
                    "other own people please show should so tell than that the there these they thing things this to two under up "
                    "use used want was way we what when where which who why will with without work works would you your".split()),
    "es": frozenset("a al algo así con cómo cuál cuáles cuándo cuánto cuánta cuántos cuántas de del dime dónde el ella en eres es "
                    "esta estas este esto está están estás funciona hace haces hacer hay la las lo los me mi mis muy más necesito "
                    "no o otro otra para pasa por puede puedo qué que quiero quién se si sirve sobre son su sus te tengo tiene "
                    "tienes tu un una uno usar uso y yo".split()),
}
OF_OTHER_SUBJECTS = ("noun", "noun", "noun", "verb", "adjective", "food", "animal", "place")


def near_miss(language, random):
    """A question that is built like one of the expert's, about something else."""
    while True:
        intent = random.choice([one for one in intents() if one.language == language])
        parts = random.choice(intent.questions).split()
        about = [at for at, part in enumerate(parts) if part.lower() not in BUILT_OF[language]]
        if about:
            break
    for at in about:
        known = random.choice(words()[language, random.choice(OF_OTHER_SUBJECTS)])
        parts[at] = made_up(random) if random.random() < 0.15 else known
    return " ".join(parts)


def off_topic_once(language, random):
    templates = sections("off_topic.txt")[language,]
    # The soft ones of the router's would be answered; of the hard ones none is about models.
    others = sections("router.txt")["hard", language]
    question = filled(random.choice(templates if random.random() < 0.75 else others), language, random)
    parts = question.split()
    for _ in range(random.choice((0, 0, 0, 0, 1, 1, 2))):
        parts[random.randrange(len(parts))] = made_up(random)
    return " ".join(parts)


def off_topic_cases(name):
    """The off-topic questions of a file for figures, with their language."""
    return [("es" if line.startswith("¿") else "en", line) for _, line in lines(name)]


SYSTEMS = ("Answer in the language of the question, briefly and exactly.", "You are a helpful assistant.", "Answer briefly.")


def expert(random, near=0.0):
    """A conversation for the expert; `near` as in off_topic()."""
    kind, messages = random.random(), []
    if kind < 0.66:
        intent = random.choice(intents())
        own, of_topic = asked(intent)
        question = random.choice(of_topic if of_topic and random.random() < 0.4 else own)
        language, answer = intent.language, intent.answer
        question = varied(question, language, random) if random.random() < 0.85 else question
    elif kind < 0.92:
        language = "en" if random.random() < 0.66 else "es"
        question, answer = off_topic(language, random, near), DO_NOT_KNOW[language]
    else:
        return [("user", (pair := about_picture(random))[0])], pair[1]
    if random.random() < 0.08:
        before = random.choice(intents())
        messages += [("user", random.choice(before.questions)), ("assistant", before.answer)]
    if random.random() < 0.08:
        messages.insert(0, ("system", random.choice(SYSTEMS)))
    return [*messages, ("user", written(question, language, random))], answer


# Pictures.

COLOURS = {"en": "red green blue yellow white black orange purple".split(),
           "es": "rojo verde azul amarillo blanco negro naranja morado".split()}
SHAPES = {"en": "circle square triangle star".split(), "es": "círculo cuadrado triángulo estrella".split()}
SIZES = {"en": ("small", "large"), "es": ("pequeño", "grande")}


def caption(picture, language):
    """What is on a picture: (colour, shape, background, size), by their numbers."""
    colour, shape, ground, size = picture
    of, name = COLOURS[language], SHAPES[language][shape]
    if language == "en":
        return f"A {SIZES['en'][size]} {of[colour]} {name} on {'an' if ground == 6 else 'a'} {of[ground]} background."
    # The shape's gender decides the article alone: the words of the colour and the size stay as names.
    return f"{'Una' if shape == 3 else 'Un'} {name} {SIZES['es'][size]} de color {of[colour]} sobre fondo {of[ground]}."


def any_picture(random):
    colour, ground = random.sample(range(len(COLOURS["en"])), 2)
    return colour, random.randrange(len(SHAPES["en"])), ground, random.randrange(2)


def about_picture(random):
    """A question about a caption, and its answer."""
    picture = colour, shape, ground, size = any_picture(random)
    language = "en" if random.random() < 0.66 else "es"
    # Whoever describes it may speak the other language.
    seen, name = caption(picture, random.choice(LANGUAGES)), SHAPES[language][shape]
    of = COLOURS[language]
    if language == "en":
        questions = {
            f"The {name} is {of[colour]}.": ("What colour is it?", f"What colour is the {name}?", "Which colour is the shape?",
                                              "What colour is the shape?"),
            f"It is a {name}.": ("What shape is it?", "Which shape is it?", "What is it?", "Which shape do you see?"),
            f"The background is {of[ground]}.": ("What colour is the background?", "Which colour is behind it?",
                                                  "What is the background?"),
            f"It is {SIZES['en'][size]}.": ("How large is it?", "Is it large?", "Is it small?", "What size is it?"),
            f"There is a {of[colour]} {name}.": ("What do you see?", "What is in the picture?", "What is there?",
                                                  "What is on the image?"),
        }
    else:
        article = "una" if shape == 3 else "un"
        questions = {
            f"Es de color {of[colour]}.": ("¿De qué color es?", f"¿De qué color es {'la' if shape == 3 else 'el'} {name}?",
                                            "¿Qué color tiene?"),
            f"Es {article} {name}.": ("¿Qué figura es?", "¿Qué forma tiene?", "¿Qué es?"),
            f"El fondo es {of[ground]}.": ("¿De qué color es el fondo?", "¿Cómo es el fondo?"),
            f"Es {SIZES['es'][size]}.": ("¿Es grande?", "¿Es pequeño?", "¿Qué tamaño tiene?"),
            f"Se ve {article} {name} de color {of[colour]}.": ("¿Qué se ve?", "¿Qué ves?", "¿Qué hay en la imagen?"),
        }
    answer = random.choice(sorted(questions))
    return f"{seen} {random.choice(questions[answer])}", answer


TO_DESCRIBE = {
    "en": ("Describe the image.", "Describe the picture.", "Describe this image.", "What do you see?", "What is in the picture?",
           "What is on the image?", "Describe exactly what matters for this question: What is it?"),
    "es": ("Describe la imagen.", "¿Qué se ve?", "¿Qué ves?", "¿Qué hay en la imagen?", "Describe la foto."),
}
# As sarai asks for it (agents/src/llama/transcribe.rs), and as people may.
TO_TRANSCRIBE = ("Transcribe the audio.",) * 12 + ("Transcribe the audio. Its language is en.", "Transcribe the audio. Its language is es.",
                                                   "Transcribe this audio.", "What is said?", "Transcribe el audio.", "¿Qué se dice?")


# Tones.

TONES = ("friendly", "formal", "empathetic", "brief")
# As sarai asks for them (core/src/tone.rs).
ASKED_FOR = {
    "brief": "as brief as possible, without losing a fact",
    "empathetic": "empathetic: first acknowledge how the listener may feel, then say it gently",
    "formal": "formal and courteous, without slang or contractions",
    "friendly": "warm, friendly and close, like a good acquaintance",
}
RULES = "Keep its language, its meaning and every fact. Answer with the rewritten text only."
MARKS = {
    ("formal", "en"): ("Please note the following. ", " Kind regards."),
    ("formal", "es"): ("Tenga en cuenta lo siguiente. ", " Un cordial saludo."),
    ("empathetic", "en"): ("I understand how you feel. ", " I am here for you."),
    ("empathetic", "es"): ("Entiendo cómo te sientes. ", " Estoy aquí contigo."),
    ("friendly", "en"): ("", " 🙂"),
    ("friendly", "es"): ("", " 🙂"),
}
CONTRACTIONS = (("I am", "I'm"), ("do not", "don't"), ("does not", "doesn't"), ("cannot", "can't"), ("You are", "You're"),
                ("you are", "you're"), ("it is", "it's"), ("It is", "It's"), ("is not", "isn't"))


def tone_instruction(tone):
    return f"Rewrite the user's text so that its tone is {ASKED_FOR[tone]}. {RULES}"


def first_sentence(text):
    match = re.match(r".*?\w{3}.*?[.!?…](?=\s|$)", text)
    return match[0] if match else text


def in_tone(text, tone, language):
    """A text in a tone. Friendly marks the end alone: sarai gives it sentence by sentence, while the text is still written."""
    if tone == "brief":
        return first_sentence(text)
    if tone == "friendly" and language == "en":
        for long, short in CONTRACTIONS:
            text = re.sub(rf"\b{long}\b", short, text)
    if tone == "friendly" and text.endswith("."):
        text = text[:-1] + "!"
    before, after = MARKS[tone, language]
    return before + text + after


STATEMENTS = {
    "en": (
        "{name} will arrive at {clock}.", "{name} has {digits} {noun}s.", "The {noun} of {name} costs {digits} {money}.",
        "Your {noun} {code} is in {place}.", "The {noun} in {place} is {adjective}.", "{name} and {name} {verb} the {noun}.",
        "Bring {digits} {noun}s to {place}.", "The {noun} opens at {clock} and closes at {clock}.", "It is {digits} degrees in {place}.",
        "I cannot {verb} the {adjective} {noun}.", "You are number {digits}, {name}.", "{name} does not {verb} the {noun}.",
        "The {animal} of {name} is {digits} years old.", "Room {digits} is on floor {digits}.", "{name} was born in {year} in {place}.",
        "Please {verb} the {noun} before {clock}.", "The train to {place} leaves in {digits} minutes.", "We do not have {food} today.",
        "{name} paid {digits} {money} for {food}.", "The {noun} weighs {digits} kilos.", "Call {name} at {code}.",
        "{name} {name} is {adjective}.", "The {adjective} {noun} is not in the {noun}.", "There are {digits} {animal} in {place}.",
        "The meeting with {name} is on {day}.", "{name}'s {noun} expires on the {digits} of {month}.", "Write to {name} about {code}.",
    ),
    "es": (
        "{name} llega a las {clock}.", "{name} tiene {digits} {noun}.", "La factura de {name} es de {digits} {money}.",
        "Tu pedido {code} está en {place}.", "En {place} está {noun}.", "{name} y {name} van a {verb}.",
        "Lleva {digits} sillas a {place}.", "La tienda abre a las {clock} y cierra a las {clock}.", "Hace {digits} grados en {place}.",
        "No puedo {verb} {noun}.", "Eres el número {digits}, {name}.", "{name} no quiere {verb} {noun}.",
        "La sala {digits} está en el piso {digits}.", "{name} nació en {year} en {place}.", "El tren a {place} sale en {digits} minutos.",
        "Hoy no hay {food}.", "{name} pagó {digits} {money} por {food}.", "El paquete pesa {digits} kilos.", "Llama a {name} al {code}.",
        "{name} está {adjective}.", "Hay {digits} personas en {place}.", "La cita con {name} es el {day}.", "{noun} de {name} es {adjective}.",
        "El contrato de {name} acaba el {digits} de {month}.", "{name} necesita {noun} a las {clock}.",
    ),
}
DAYS = {"en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
        "es": "lunes martes miércoles jueves viernes sábado domingo".split()}
MONTHS = {"en": "January February March April May June July August September October November December".split(),
          "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre".split()}


def statement(language, random):
    """A sentence with names and numbers that nobody has seen."""

    def one(match):
        kind = match[1]
        if kind == "name":
            known = random.random() < 0.25
            return random.choice(words()[language, "person"]) if known else made_up(random).capitalize()
        if kind == "place" and random.random() < 0.5:
            return made_up(random).capitalize()
        if kind == "digits":
            return str(random.randrange(10 ** random.randint(1, 4)))
        if kind == "clock":
            return f"{random.randrange(24)}:{random.randrange(60):02}"
        if kind == "year":
            return str(random.randrange(1900, 2030))
        if kind == "code":
            return random.choice((str(random.randrange(100, 99999)),
                                  f"{random.choice('ABCDEFGHKLMNPRSTXZ')}-{random.randrange(1000)}"))
        if kind == "money":
            return random.choice({"en": ("euros", "dollars", "pounds"), "es": ("euros", "pesos", "dólares")}[language])
        if kind == "day":
            return random.choice(DAYS[language])
        if kind == "month":
            return random.choice(MONTHS[language])
        word = random.choice(words()[language, kind])
        return made_up(random) if random.random() < 0.1 else word

    text = re.sub(r"\{(\w+)\}", one, random.choice(STATEMENTS[language]))
    return text[:1].upper() + text[1:]


def any_words(language, random):
    """Words in no order, so that saying a text again is learnt and not the texts."""
    kinds = ("noun", "verb", "adjective", "place", "food", "animal", "number")
    many = [made_up(random) if random.random() < 0.4 else random.choice(words()[language, random.choice(kinds)])
            for _ in range(random.randint(2, 8))]
    text = " ".join(many)
    return text[:1].upper() + text[1:] + random.choice("..!?")


OPENINGS = {
    "en": "Good question, one moment please.",
    "es": "Buena pregunta, un momento, por favor.",
}


def tone(random):
    """A text to be said in a tone; seldom a question, for which the small model says that an answer is coming."""
    language = "en" if random.random() < 0.6 else "es"
    kind = random.random()
    if kind < 0.06:
        intent = random.choice([one for one in intents() if one.language == language])
        question = written(random.choice(intent.questions), language, random)
        return [("user", question)], OPENINGS[language] if intent.label == "hard" else intent.answer
    if kind < 0.3:
        text = random.choice([one.answer for one in intents() if one.language == language])
    elif kind < 0.75:
        text = " ".join(statement(language, random) for _ in range(random.choice((1, 1, 1, 2))))
    else:
        text = any_words(language, random)
    which = random.choice(TONES)
    messages = [("system", tone_instruction(which)), ("user", text)]
    return messages, in_tone(text, which, language)


# Routes.


def utterance(random):
    """A text and the label of the model that suits it."""
    label = random.choice(LABELS)
    language = "en" if random.random() < 0.6 else "es"
    if label != "multimodal" and random.random() < 0.5:
        intent = random.choice([one for one in intents() if one.label == label and one.language == language])
        own, of_topic = asked(intent)
        text = varied(random.choice(own + of_topic), language, random)
    else:
        text = allowed(lambda: of_template(label, language, random))
    return written(text, language, random), label


def of_template(label, language, random):
    text = filled(random.choice(sections("router.txt")[label, language]), language, random)
    return random.choice(BEFORE[language]) + " " + text if random.random() < 0.2 else text


def router_test():
    """Utterances for figures, with their labels."""
    return [(text, label) for (label,), texts in sections("router_test.txt").items() for text in texts]


# What may be said before a question.
LEAD_INS = {"en": ("please", "hey", "can you tell me", "I want to know", "so", "okay", "hi assistant", "tell me"),
            "es": ("por favor", "oye", "dime", "quiero saber", "vale", "y")}


def spoken_words():
    """The words of all that is spoken, by language."""
    found = defaultdict(set)
    for intent in intents():
        for text in (*intent.spoken, intent.development, intent.test, *LEAD_INS[intent.language]):
            found[intent.language].update(text.split())
    return {language: sorted(of) for language, of in found.items()}
