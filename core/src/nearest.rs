//! The nearest of some known names to one that was mistyped.

/// The known name most like `given`, if any is like enough to be what was meant.
#[must_use]
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    known
        .into_iter()
        .map(|name| (strsim::jaro_winkler(given, name), name))
        .filter(|(likeness, _)| *likeness >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn a_slip_is_recognised_and_a_different_word_is_not() {
        let known = ["solar", "lfm2", "omni"];
        assert_eq!(nearest("soler", known).as_deref(), Some("solar"));
        assert_eq!(nearest("lfm", known).as_deref(), Some("lfm2"));
        assert_eq!(nearest("mistral", known), None);
    }
}
