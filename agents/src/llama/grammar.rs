//! Grammars in GBNF, read as llama.cpp reads them, and before it does: it says what is wrong with one on stderr alone, and
//! some small ones take all its time, its stack or the process's memory.

use std::collections::{BTreeMap, BTreeSet};

/// Longest grammar, and deepest nesting of groups in it.
const LONGEST: usize = 1 << 20;
const DEEPEST: usize = 64;
/// Symbols in all rules, with repetitions written out as llama.cpp writes them.
const MOST_SYMBOLS: usize = 1 << 20;
/// llama.cpp's own limit of repetitions (`MAX_REPETITION_THRESHOLD`), which it does not look at everywhere.
const MOST_TIMES: u64 = 2000;
/// Rules that each begin with the next: llama.cpp follows them recursively, along every path.
const LONGEST_CHAIN: usize = 256;
const MOST_STEPS: usize = 1 << 20;
/// Ways to go on from one place in a text, and from all: llama.cpp keeps them apart, and compares each with all others.
const MOST_WAYS: usize = 1 << 14;
const MOST_WAYS_IN_ALL: usize = 1 << 19;

/// Whether llama.cpp may read a grammar; else what is wrong with it, and where. `is_token` says whether a text such as
/// `<|end|>` is one token of the vocabulary.
pub(super) fn check(text: &str, is_token: &dyn Fn(&str) -> bool) -> Result<(), String> {
    if text.len() > LONGEST {
        return Err(format!("it is longer than {LONGEST} bytes"));
    }
    if text.contains('\0') {
        return Err("it has a NUL byte".to_owned());
    }
    let rules = Reader::new(text, is_token).read()?;
    rules.follow_beginnings()?;
    rules.follow_ways()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Symbol {
    /// One character, a part of a class of characters, or a token.
    Terminal,
    Rule(usize),
    /// Between two alternatives.
    Or,
}

/// All rules, those included that stand for groups and repetitions.
struct Rules<'t> {
    /// By their numbers. A group's is that of the rule it is in.
    names: Vec<&'t str>,
    bodies: Vec<Option<Vec<Symbol>>>,
}

impl Rules<'_> {
    fn body(&self, rule: usize) -> &[Symbol] {
        self.bodies[rule].as_deref().unwrap_or_default()
    }

    fn wrong(&self, rule: usize, what: &str) -> String {
        format!("rule `{}` {what}", self.names[rule])
    }

    /// What each rule may begin with, as llama.cpp sees it: behind a rule that has an empty alternative, the next one, too.
    fn beginnings(&self) -> Vec<Vec<usize>> {
        let alternatives = |rule| self.body(rule).split(|symbol| *symbol == Symbol::Or);
        let rules = 0..self.names.len();
        let empty: Vec<bool> = rules.clone().map(|rule| alternatives(rule).any(<[_]>::is_empty)).collect();
        let beginning = |alternative: &[Symbol]| {
            let mut all = Vec::new();
            for symbol in alternative {
                let Symbol::Rule(first) = *symbol else { break };
                all.push(first);
                if !empty[first] {
                    break;
                }
            }
            all
        };
        rules.map(|rule| alternatives(rule).flat_map(beginning).collect()).collect()
    }

    /// Follows what rules begin with along every path, as llama.cpp does to find one that begins with itself.
    fn follow_beginnings(&self) -> Result<(), String> {
        let count = self.names.len();
        let beginnings = self.beginnings();
        let (mut open, mut done) = (vec![false; count], vec![false; count]);
        let mut steps = 0;
        for first in 0..count {
            if done[first] {
                continue;
            }
            open[first] = true;
            let mut path = vec![(first, 0)];
            while let Some((rule, at)) = path.pop() {
                let Some(&next) = beginnings[rule].get(at) else {
                    (open[rule], done[rule]) = (false, true);
                    continue;
                };
                steps += 1;
                if open[next] {
                    return Err(self.wrong(next, "begins with itself"));
                }
                if path.len() + 2 > LONGEST_CHAIN {
                    return Err(
                        self.wrong(first, &format!("begins with a chain of more than {LONGEST_CHAIN} rules"))
                    );
                }
                if steps > MOST_STEPS {
                    return Err(self.wrong(first, "begins with other rules in too many ways"));
                }
                open[next] = true;
                path.extend([(rule, at + 1), (next, 0)]);
            }
        }
        Ok(())
    }

    /// Counts the ways to go on from every place in a text where more than one character may follow.
    fn follow_ways(&self) -> Result<(), String> {
        let places = Places::new(self);
        let mut all = 0;
        for rule in 0..self.names.len() {
            let alternatives = &places.alternatives[rule];
            all += places.ways(alternatives.iter().map(|at| vec![*at]).collect(), self, rule)?;
            let begins = alternatives.first().copied().unwrap_or(0);
            for at in begins + 1..begins + self.body(rule).len() {
                let follows = places.symbols[at - 1] == Symbol::Terminal;
                if follows && matches!(places.symbols[at], Symbol::Rule(_)) {
                    all += places.ways(vec![vec![at]], self, rule)?;
                }
                if all > MOST_WAYS_IN_ALL {
                    return Err("it has too many ways to go on".to_owned());
                }
            }
        }
        Ok(())
    }
}

/// All rules one after another, each closed by [`Symbol::Or`], so that a number is a place in a rule.
struct Places {
    symbols: Vec<Symbol>,
    /// Where each rule's alternatives begin.
    alternatives: Vec<Vec<usize>>,
}

impl Places {
    fn new(rules: &Rules<'_>) -> Self {
        let (mut symbols, mut alternatives) = (Vec::new(), Vec::new());
        for rule in 0..rules.names.len() {
            let (begins, body) = (symbols.len(), rules.body(rule));
            let ors = body.iter().enumerate().filter(|(_, symbol)| **symbol == Symbol::Or);
            let behind = ors.map(|(at, _)| begins + at + 1);
            alternatives.push(std::iter::once(begins).chain(behind).collect());
            symbols.extend(body);
            symbols.push(Symbol::Or);
        }
        Self { symbols, alternatives }
    }

    /// How many ways there are to go on from `todo`. Each is a stack: what comes next is its last place, below it are those
    /// to go on from when the rules above have ended. Mirrors `llama_grammar_advance_stack`.
    fn ways(&self, mut todo: Vec<Vec<usize>>, rules: &Rules<'_>, of: usize) -> Result<usize, String> {
        let mut seen = BTreeSet::new();
        let mut count = todo.len();
        while let Some(stack) = todo.pop() {
            if count > MOST_WAYS {
                return Err(rules.wrong(of, "has too many ways to go on"));
            }
            if stack.len() > LONGEST_CHAIN {
                return Err(rules.wrong(of, "may begin with itself behind what may be empty"));
            }
            let Some((&top, below)) = stack.split_last() else { continue };
            if seen.contains(&stack) {
                continue;
            }
            if let Symbol::Rule(rule) = self.symbols[top] {
                for begins in &self.alternatives[rule] {
                    let rest = [top + 1, *begins].into_iter().filter(|at| self.symbols[*at] != Symbol::Or);
                    let next: Vec<usize> = below.iter().copied().chain(rest).collect();
                    count += 1;
                    todo.extend((!seen.contains(&next)).then_some(next));
                }
            }
            seen.insert(stack);
        }
        Ok(count)
    }
}

/// Reads a grammar by llama.cpp's rules (`llama_grammar_parser`).
struct Reader<'t> {
    text: &'t str,
    /// What is left of it.
    rest: &'t str,
    is_token: &'t dyn Fn(&str) -> bool,
    ids: BTreeMap<&'t str, usize>,
    rules: Rules<'t>,
    symbols: usize,
}

/// What the last repetition may be of: from where in the body, and how many rules that stands for.
struct Last {
    from: usize,
    rules: u64,
}

impl<'t> Reader<'t> {
    fn new(text: &'t str, is_token: &'t dyn Fn(&str) -> bool) -> Self {
        let rules = Rules { names: Vec::new(), bodies: Vec::new() };
        Self { text, rest: text, is_token, ids: BTreeMap::new(), rules, symbols: 0 }
    }

    fn read(mut self) -> Result<Rules<'t>, String> {
        self.blanks(true);
        while !self.rest.is_empty() {
            self.rule()?;
        }
        if self.ids.get("root").is_none_or(|root| self.rules.bodies[*root].is_none()) {
            return Err("it has no rule `root`".to_owned());
        }
        match self.rules.bodies.iter().position(Option::is_none) {
            Some(missing) => Err(self.rules.wrong(missing, "is used and not defined")),
            None => Ok(self.rules),
        }
    }

    fn rule(&mut self) -> Result<(), String> {
        let name = self.name();
        if name.is_empty() {
            return Err(self.wrong("the name of a rule is expected, of letters, digits and hyphens"));
        }
        self.blanks(false);
        if !self.take("::=") {
            return Err(self.wrong(&format!("`::=` is expected behind `{name}`")));
        }
        self.blanks(true);
        let rule = self.id(name);
        self.alternatives(rule, 0)?;
        if !self.rest.is_empty() && !["\r\n", "\r", "\n"].into_iter().any(|end| self.take(end)) {
            return Err(self.wrong(&format!("in rule `{name}`, `{}` has no meaning", self.next())));
        }
        self.blanks(true);
        Ok(())
    }

    fn alternatives(&mut self, rule: usize, depth: usize) -> Result<(), String> {
        let mut body = Vec::new();
        self.sequence(rule, depth, &mut body)?;
        while self.take("|") {
            self.blanks(true);
            self.add(&mut body, Symbol::Or)?;
            self.sequence(rule, depth, &mut body)?;
        }
        self.rules.bodies[rule] = Some(body);
        Ok(())
    }

    fn sequence(&mut self, rule: usize, depth: usize, body: &mut Vec<Symbol>) -> Result<(), String> {
        let mut last = Last { from: body.len(), rules: 1 };
        while let Some(c) = self.rest.chars().next() {
            let from = body.len();
            match c {
                '"' => self.literal(body)?,
                '[' => self.class(body)?,
                '<' | '!' => self.token(body)?,
                '.' => {
                    self.take(".");
                    self.add(body, Symbol::Terminal)?;
                }
                '(' => {
                    let before = self.rules.names.len();
                    self.group(rule, depth, body)?;
                    last.rules = (self.rules.names.len() - before).max(1) as u64;
                }
                '*' | '+' | '?' | '{' => self.repetition(rule, body, &mut last)?,
                _ if is_name(c) => {
                    let name = self.name();
                    let id = self.id(name);
                    self.add(body, Symbol::Rule(id))?;
                }
                _ => break,
            }
            match c {
                '*' | '+' | '?' | '{' => {}
                '(' => last.from = from,
                _ => last = Last { from, rules: 1 },
            }
            self.blanks(depth > 0);
        }
        Ok(())
    }

    fn literal(&mut self, body: &mut Vec<Symbol>) -> Result<(), String> {
        self.take("\"");
        while !self.take("\"") {
            self.character()?;
            self.add(body, Symbol::Terminal)?;
        }
        Ok(())
    }

    fn class(&mut self, body: &mut Vec<Symbol>) -> Result<(), String> {
        self.take("[");
        self.take("^");
        while !self.take("]") {
            self.character()?;
            self.add(body, Symbol::Terminal)?;
            if !self.rest.starts_with("-]") && self.take("-") {
                self.character()?;
                self.add(body, Symbol::Terminal)?;
            }
        }
        Ok(())
    }

    /// A character of a literal or of a class.
    fn character(&mut self) -> Result<(), String> {
        let mut next = self.rest.chars();
        let length = match (next.next(), next.next()) {
            (None, _) => return Err(self.wrong("a literal or a class is not closed")),
            (Some('\\'), escaped) => {
                let digits = match escaped {
                    Some('x') => 2,
                    Some('u') => 4,
                    Some('U') => 8,
                    Some('t' | 'r' | 'n' | '\\' | '"' | '[' | ']' | '-') => 0,
                    Some(_) | None => return Err(self.wrong("an escape is unknown")),
                };
                let hexadecimal = |digits: &str| digits.bytes().all(|digit| digit.is_ascii_hexdigit());
                if !self.rest.get(2..2 + digits).is_some_and(hexadecimal) {
                    return Err(self.wrong(&format!("an escape needs {digits} hexadecimal digits")));
                }
                2 + digits
            }
            (Some(c), _) => c.len_utf8(),
        };
        self.rest = &self.rest[length..];
        Ok(())
    }

    /// `<[123]>` or `<text>`, with `!` before it any other.
    fn token(&mut self, body: &mut Vec<Symbol>) -> Result<(), String> {
        self.take("!");
        let Some(length) = self.rest.find('>').filter(|_| self.rest.starts_with('<')).map(|at| at + 1) else {
            return Err(self.wrong("a token is expected, such as <[1]>"));
        };
        let token = &self.rest[..length];
        let number = token.strip_prefix("<[").and_then(|token| token.strip_suffix("]>"));
        let is_number = |number: &str| {
            number.bytes().all(|digit| digit.is_ascii_digit()) && number.parse::<u32>().is_ok()
        };
        if !number.map_or_else(|| !token.starts_with("<[") && (self.is_token)(token), is_number) {
            return Err(self.wrong(&format!("`{token}` is no token of the vocabulary")));
        }
        self.rest = &self.rest[length..];
        self.add(body, Symbol::Terminal)
    }

    fn group(&mut self, rule: usize, depth: usize, body: &mut Vec<Symbol>) -> Result<(), String> {
        if depth == DEEPEST {
            return Err(self.wrong(&format!("groups are nested deeper than {DEEPEST}")));
        }
        self.take("(");
        self.blanks(true);
        let group = self.nameless(rule);
        self.alternatives(group, depth + 1)?;
        if !self.take(")") {
            return Err(self.wrong("a group is not closed"));
        }
        self.add(body, Symbol::Rule(group))
    }

    /// Writes a repetition out: what has to be there as often as that, and a rule for each time more.
    fn repetition(&mut self, rule: usize, body: &mut Vec<Symbol>, last: &mut Last) -> Result<(), String> {
        let (least, most) = self.times()?;
        if last.from == body.len() {
            return Err(self.wrong("a repetition needs something before it"));
        }
        // llama.cpp would go on to count from here until its memory ends.
        if most.is_some_and(|most| most < least) {
            return Err(self.wrong("a repetition ends before it begins"));
        }
        if least > MOST_TIMES {
            return Err(self.wrong(&format!("a repetition of more than {MOST_TIMES} times")));
        }
        let most = most.filter(|most| *most <= MOST_TIMES);
        last.rules *= most.unwrap_or(least).max(1);
        if last.rules > MOST_TIMES {
            return Err(self.wrong(&format!("repetitions within each other come to more than {MOST_TIMES}")));
        }
        let repeated = body[last.from..].to_vec();
        let optional = most.map_or(1, |most| most - least);
        let copies = least.saturating_sub(1) + optional;
        self.grow(copies as usize * (repeated.len() + 2))?;
        if least == 0 {
            body.truncate(last.from);
        }
        for _ in 1..least {
            body.extend_from_slice(&repeated);
        }
        let mut next = None;
        for _ in 0..optional {
            let once_more = self.nameless(rule);
            let follows = if most.is_none() { Some(once_more) } else { next };
            let again = repeated.iter().copied().chain(follows.map(Symbol::Rule)).chain([Symbol::Or]);
            self.rules.bodies[once_more] = Some(again.collect());
            next = Some(once_more);
        }
        body.extend(next.map(Symbol::Rule));
        Ok(())
    }

    /// How often at least, and at most.
    fn times(&mut self) -> Result<(u64, Option<u64>), String> {
        for (sign, times) in [("*", (0, None)), ("+", (1, None)), ("?", (0, Some(1)))] {
            if self.take(sign) {
                return Ok(times);
            }
        }
        self.take("{");
        self.blanks(true);
        let least = self.number()?;
        self.blanks(true);
        let most = if self.take(",") {
            self.blanks(true);
            let open = self.rest.starts_with('}');
            if open { None } else { Some(self.number()?) }
        } else {
            Some(least)
        };
        self.blanks(true);
        if self.take("}") { Ok((least, most)) } else { Err(self.wrong("a repetition is not closed")) }
    }

    fn number(&mut self) -> Result<u64, String> {
        let length = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(length);
        let number = digits.parse().map_err(|_| self.wrong("a repetition needs a number"))?;
        self.rest = rest;
        Ok(number)
    }

    fn name(&mut self) -> &'t str {
        let (name, rest) = self.rest.split_at(self.rest.find(|c| !is_name(c)).unwrap_or(self.rest.len()));
        self.rest = rest;
        name
    }

    fn id(&mut self, name: &'t str) -> usize {
        let next = self.rules.names.len();
        let id = *self.ids.entry(name).or_insert(next);
        if id == next {
            self.rules.names.push(name);
            self.rules.bodies.push(None);
        }
        id
    }

    /// A rule that stands for a part of another one.
    fn nameless(&mut self, of: usize) -> usize {
        self.rules.names.push(self.rules.names[of]);
        self.rules.bodies.push(None);
        self.rules.names.len() - 1
    }

    fn add(&mut self, body: &mut Vec<Symbol>, symbol: Symbol) -> Result<(), String> {
        self.grow(1)?;
        body.push(symbol);
        Ok(())
    }

    fn grow(&mut self, by: usize) -> Result<(), String> {
        self.symbols += by;
        if self.symbols > MOST_SYMBOLS {
            return Err(self.wrong(&format!("it has more than {MOST_SYMBOLS} symbols, repetitions included")));
        }
        Ok(())
    }

    fn take(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Blanks and comments; ends of lines, too, where a rule may go on behind them.
    fn blanks(&mut self, lines: bool) {
        loop {
            let blank = |c: char| matches!(c, ' ' | '\t') || lines && matches!(c, '\r' | '\n');
            self.rest = self.rest.trim_start_matches(blank);
            if !self.rest.starts_with('#') {
                return;
            }
            let end = self.rest.find(['\r', '\n']).unwrap_or(self.rest.len());
            self.rest = &self.rest[end..];
        }
    }

    fn next(&self) -> String {
        self.rest.chars().take(1).collect()
    }

    fn wrong(&self, what: &str) -> String {
        let read = &self.text[..self.text.len() - self.rest.len()];
        format!("line {}: {what}", read.matches('\n').count() + 1)
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<(), String> {
        check(text, &|token| token == "<|end|>")
    }

    fn reason(text: &str) -> String {
        checked(text).unwrap_err()
    }

    #[test]
    fn what_llama_cpp_can_read_is_let_through() {
        for text in [
            "root ::= \"(((\" [(\\]#] . # (((\n",
            "# first\n\nroot ::= (\n  item \", \" # a comment\n  | [^a-z\\x41-]\n)* item?\nitem ::= \"\\u00e9\" | [0-9]{2,4} | \n",
            "root ::= a+ b{3} c{1,} <|end|> !<[7]>\r\na ::= \"a\" a | \"b\"\r\nb-2 ::= \"b\"\r\nb ::= b-2\rc ::= ws \"c\"\nws ::= [ \\t\\n]*",
            "root ::= \"a\" root \"b\" | \"\"",
            "root ::= (\"a\"? \"b\"?)*",
        ] {
            assert_eq!(checked(text), Ok(()), "{text}");
        }
        let words: Vec<String> = (0..5000).map(|n| format!("\"word{n}\"")).collect();
        assert_eq!(checked(&format!("root ::= ({}) \".\"", words.join(" | "))), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        for (text, expected) in [
            ("", "it has no rule `root`"),
            ("rot ::= \"x\"", "it has no rule `root`"),
            ("root ::= \"\0\"", "it has a NUL byte"),
            ("root ::= \"x\"\n= y", "line 2: the name of a rule is expected, of letters, digits and hyphens"),
            ("root = \"x\"", "line 1: `::=` is expected behind `root`"),
            ("root ::= \"unclosed", "line 1: a literal or a class is not closed"),
            ("root ::= [unclosed", "line 1: a literal or a class is not closed"),
            ("root ::= \"\\q\"", "line 1: an escape is unknown"),
            ("root ::= \"\\u00g0\"", "line 1: an escape needs 4 hexadecimal digits"),
            ("root ::= (\"x\"\n\n", "line 3: a group is not closed"),
            ("root ::= missing", "rule `missing` is used and not defined"),
            ("root ::= \"x\" ) ", "line 1: in rule `root`, `)` has no meaning"),
            ("root ::= * ", "line 1: a repetition needs something before it"),
            ("root ::= \"x\"{2", "line 1: a repetition is not closed"),
            ("root ::= \"x\"{}", "line 1: a repetition needs a number"),
            ("root ::= \"x\"{3,1}", "line 1: a repetition ends before it begins"),
            ("root ::= \"x\"{2001}", "line 1: a repetition of more than 2000 times"),
            ("root ::= <|no|>", "line 1: `<|no|>` is no token of the vocabulary"),
            ("root ::= <[x]>", "line 1: `<[x]>` is no token of the vocabulary"),
            ("root ::= <x", "line 1: a token is expected, such as <[1]>"),
        ] {
            assert_eq!(reason(text), expected, "{text}");
        }
    }

    #[test]
    fn groups_nested_too_deeply_and_what_grows_by_repetitions_are_refused() {
        let deep = format!("a ::= \"x\"\nroot ::= {}\"x\"", "(".repeat(10_000));
        assert_eq!(reason(&deep), "line 2: groups are nested deeper than 64");
        assert!(reason("root ::= (\"x\"{0,2000}){0,2000}").contains("come to more than 2000"));
        let long = format!("root ::= \"{}\"{{2000}}", "x".repeat(10_000));
        assert!(reason(&long).contains("1048576 symbols"), "{}", reason(&long));
    }

    #[test]
    fn a_rule_that_begins_with_itself_is_named() {
        assert_eq!(reason("root ::= root \"a\" | \"b\""), "rule `root` begins with itself");
        assert_eq!(
            reason("root ::= \"(\" a\na ::= b\nb ::= c | a \"x\"\nc ::= \"c\""),
            "rule `a` begins with itself"
        );
        assert_eq!(
            reason("root ::= a\na ::= b a \"x\" | \"y\"\nb ::= c\nc ::= \"z\" | \"\""),
            "rule `root` may begin with itself behind what may be empty"
        );
    }

    /// Small enough to look harmless, and more than llama.cpp's reader or the process could stand.
    #[test]
    fn beginnings_with_more_paths_than_can_be_followed_are_refused() {
        let levels = |of: fn(usize) -> String, last: &str| {
            let rules: String = (0..40).map(|n| format!("r{n} ::= {}\n", of(n + 1))).collect();
            format!("root ::= r0\n{rules}r40 ::= {last}\n")
        };
        let twice = levels(|n| format!("r{n} | r{n}"), "\"x\"");
        assert!(reason(&twice).contains("in too many ways"), "{}", reason(&twice));
        let apart = levels(|n| format!("r{n} \"a\" | r{n} \"b\""), "\"x\"");
        assert!(reason(&apart).contains("in too many ways"), "{}", reason(&apart));
        let empty =
            levels(|n| format!("r{n} r{n}"), "e").replace("r40 ::= e", "r40 ::= e\ne ::= \"x\" | \"\"");
        assert!(reason(&empty).contains("ways to go on"), "{}", reason(&empty));
        let chain: String = (0..80_000).map(|n| format!("r{n} ::= r{}\n", n + 1)).collect();
        let chain = format!("root ::= r0\n{}r80000 ::= \"x\"", &chain[..]);
        let chain = reason(&chain);
        assert!(
            chain.contains("longer than")
                || chain == "rule `root` begins with a chain of more than 256 rules",
            "{chain}"
        );
        let short: String = (0..400).map(|n| format!("r{n} ::= r{}\n", n + 1)).collect();
        let short = reason(&format!("root ::= \"a\" r0\n{short}r400 ::= \"x\""));
        assert_eq!(short, "rule `r0` begins with a chain of more than 256 rules");
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in r#"(root|a|b-1|::=|\||\(|\)|\{|\}|\[|\]|"|\\|x41|[0-9]|,|\*|\+|\?|<|>|!|\.|\^|-|#|é| |\n){0,40}"#) {
            let _either = checked(&format!("root ::= {text}"));
        }
    }
}
