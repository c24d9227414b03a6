//! Pipelines that stand in files of their own: `voice: pipelines/voice.yaml`.

use std::sync::Arc;

use super::at::At;
use super::check::Check;
use super::expand::expand;
use super::places::found;
use super::tree::{self, Data, Node};

/// Puts the pipelines of other files in the places where these are named.
pub(super) fn pipelines(root: &mut Node, check: &mut Check<'_>) {
    let Data::Map(entries) = &mut root.data else { return };
    let Some(pipelines) = entries.iter_mut().find(|entry| entry.key == "pipelines") else { return };
    let Data::Map(pipelines) = &mut pipelines.value.data else { return };
    pipelines.retain_mut(|entry| {
        let Data::Text { text, .. } = &entry.value.data else { return true };
        let path = At::key_path("pipelines", &entry.key);
        let file = found(text, check);
        let read = match std::fs::read_to_string(&file) {
            Ok(text) => check.within(&file, |check| read(&text, &path, check)),
            Err(error) => {
                check.problem_at(path, Some(entry.line), format!("cannot read {}: {error}", file.display()));
                None
            }
        };
        // What cannot be read has its problem noted, and is left out.
        let Some(node) = read else { return false };
        entry.value = Node { file: Some(Arc::from(file)), ..node };
        true
    });
}

/// A file's pipeline, with the lines that it has there.
fn read(text: &str, path: &str, check: &mut Check<'_>) -> Option<Node> {
    match tree::read(text) {
        Ok(mut node) => {
            expand(&mut node, path, check);
            Some(node)
        }
        Err(misfits) => {
            for misfit in misfits {
                check.problem_at(path.to_owned(), Some(misfit.line), misfit.message);
            }
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Env, Overrides, load};

    fn problems(pipeline: &str, named: &str) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sarai.yaml");
        let text = format!("models:\n  a: {{backend: gguf_native}}\npipelines:\n  p: {named}\n");
        std::fs::write(&path, text).unwrap();
        std::fs::write(folder.path().join("p.yaml"), pipeline).unwrap();
        let loaded = load(&path, &Env::default(), &Overrides::default());
        let all = loaded.map_or_else(|error| error.problems, |_| Vec::new());
        let short = |problem: &crate::config::Problem| {
            let file = problem.file.as_ref().and_then(|file| file.file_name()).unwrap().to_string_lossy();
            format!("{file}:{}: {}: {}", problem.line.unwrap(), problem.path, problem.message)
        };
        all.iter().map(short).collect()
    }

    #[test]
    fn a_pipeline_in_a_file_of_its_own_is_as_one_in_its_place() {
        assert!(problems("steps:\n  - {id: x, model: a, prompt: hi}\n", "p.yaml").is_empty());
    }

    #[test]
    fn its_problems_have_its_own_name_and_lines() {
        let steps = "steps:\n  - {id: x, model: b, prompt: hi}\n  - {id: y, model: a, promt: hi}\n\
                     \x20 - {id: z, model: a, prompt: '{{ w.text }}'}\n  - {id: v, model: a, prompt: '${NO_SUCH}'}\n";
        let found = problems(steps, "p.yaml");
        assert!(found[0].starts_with("p.yaml:2: pipelines.p.steps[0].model: "), "{found:?}");
        assert!(
            found.iter().any(|line| line.starts_with("p.yaml:3: pipelines.p.steps[1].promt: unknown key")),
            "{found:?}"
        );
        assert!(
            found
                .iter()
                .any(|line| line.starts_with("p.yaml:5: pipelines.p.steps[3].prompt: variable NO_SUCH")),
            "{found:?}"
        );
        let broken = problems("steps: [\n", "p.yaml");
        assert!(broken[0].starts_with("p.yaml:"), "{broken:?}");
        let missing = problems("", "other.yaml");
        assert!(missing[0].starts_with("sarai.yaml:4: pipelines.p: cannot read "), "{missing:?}");
    }
}
