use sarai::core::config::{Config, Place};
use serde_json::json;

use super::args::{CheckArgs, Common};
use super::exit::Failure;
use super::output::Output;
use super::session::{find, read};

pub(super) fn check(common: &Common, args: &CheckArgs, output: &Output) -> Result<(), Failure> {
    let path = find(args.file.as_deref().or(common.config.as_deref()))?;
    let resolved = read(common, &path)?;
    let mut warnings: Vec<String> = resolved.warnings.iter().map(ToString::to_string).collect();
    warnings.extend(missing_files(&resolved.config));
    if !output.json {
        warnings.iter().for_each(|warning| output.warn(warning));
    }
    if args.resolved {
        output.text(&resolved.render_resolved())?;
    } else {
        let config = &resolved.config;
        output.line(&format!(
            "{} is valid: {}, {}, {}, budget {}",
            path.display(),
            count(config.models.len(), "model"),
            count(config.hosts.len(), "host"),
            count(config.pipelines.len(), "pipeline"),
            config.memory.budget
        ))?;
    }
    let settings: serde_json::Map<String, serde_json::Value> = resolved
        .settings
        .iter()
        .map(|(path, setting)| {
            (path.clone(), json!({"value": setting.value, "source": setting.source.to_string()}))
        })
        .collect();
    output.object(&json!({"file": path, "ok": true, "warnings": warnings, "settings": settings}))
}

/// The files that models name and that are not there: not the configuration's fault, but good to know.
fn missing_files(config: &Config) -> Vec<String> {
    let mut missing = Vec::new();
    for (name, model) in &config.models {
        for place in &model.places {
            let Place::Gguf(file) = place else { continue };
            for (key, path) in [("path", Some(&file.path)), ("mmproj", file.mmproj.as_ref())] {
                if let Some(path) = path.filter(|path| !path.exists()) {
                    missing.push(format!("models.{name}.{key}: {} is not there", path.display()));
                }
            }
        }
    }
    missing
}

fn count(number: usize, what: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{number} {what}{s}")
}
