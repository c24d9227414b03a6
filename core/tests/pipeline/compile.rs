use super::parse;

/// The first problem, without file and line.
fn problem(steps: &str) -> String {
    let problem = &parse(steps).unwrap_err().problems[0];
    assert!(problem.line.is_some_and(|line| line > 9), "{problem}");
    format!("{}: {}", problem.path, problem.message)
}

#[test]
fn an_undefined_name_is_found_when_the_file_is_read_with_its_line_and_the_nearest_name() {
    let steps = "- {id: expert, model: a, prompt: \"{{ input.text }}\"}\n- {id: tone, model: b, modulate: \"{{ exprt.text }}\", tone: brief}";
    assert_eq!(
        problem(steps),
        "pipelines.p.steps[1].modulate: `exprt` is neither `input` nor a step, did you mean `expert`?"
    );
    assert_eq!(parse(steps).unwrap_err().problems[0].line, Some(11));
}

#[test]
fn an_unknown_part_of_a_step_is_found_too() {
    let message = problem("- {id: x, model: a, prompt: \"{{ input.audio }}\"}");
    assert_eq!(message, "pipelines.p.steps[0].prompt: `input` has no `audio`; it has text");
    let message = problem("- {id: x, model: a, prompt: hi}\n- {id: y, model: a, prompt: \"{{ x.label }}\"}");
    assert!(message.starts_with("pipelines.p.steps[1].prompt: `x` has no `label`"), "{message}");
    let message = problem("- {id: x, model: a, prompt: hi}\n- {id: y, model: a, prompt: \"{{ x }}\"}");
    assert!(message.contains("stands alone"), "{message}");
}

#[test]
fn a_template_that_is_none_is_named_by_its_key() {
    assert!(
        problem("- {id: x, model: a, prompt: \"{{ input.text\"}")
            .starts_with("pipelines.p.steps[0].prompt: syntax error")
    );
    assert!(
        problem("- {id: x, model: a, prompt: hi, when: \"1 +\"}").starts_with("pipelines.p.steps[0].when: ")
    );
}

#[test]
fn steps_that_wait_for_each_other_are_named() {
    let message = problem(
        "- {id: x, model: a, prompt: \"{{ y.text }}\"}\n- {id: y, model: a, prompt: \"{{ x.text }}\"}\n- {id: z, model: a, prompt: hi}",
    );
    assert_eq!(message, "pipelines.p.steps[0].id: steps wait for each other: x, y");
    assert!(problem("- {id: x, model: a, prompt: \"{{ x.text }}\"}").contains("the step refers to itself"));
}

#[test]
fn every_template_of_every_step_is_checked_in_one_go() {
    let steps = "- {id: x, model: \"{{ q.model }}\", prompt: \"{{ w.text }}\", when: \"u.text == 'a'\", fallback: \"{{ v.text }}\"}";
    let problems = parse(steps).unwrap_err().problems;
    let keys: Vec<&str> = problems.iter().filter_map(|problem| problem.path.rsplit('.').next()).collect();
    assert_eq!(keys, ["model", "prompt", "fallback", "when"]);
}
