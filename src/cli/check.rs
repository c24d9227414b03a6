use serde_json::json;

use super::args::{CheckArgs, Common};
use super::exit::Failure;
use super::output::Output;
use super::session::{find, read};

pub(super) fn check(common: &Common, args: &CheckArgs, output: &Output) -> Result<(), Failure> {
    let path = find(args.file.as_deref().or(common.config.as_deref()))?;
    let resolved = read(common, &path)?;
    for warning in &resolved.warnings {
        output.note(&format!("warning: {warning}"));
    }
    if args.resolved {
        output.text(&resolved.render_resolved())?;
    } else {
        let config = &resolved.config;
        output.line(&format!(
            "{} is good: {} models, {} hosts, {} pipelines, budget {}",
            path.display(),
            config.models.len(),
            config.hosts.len(),
            config.pipelines.len(),
            config.memory.budget
        ))?;
    }
    let warnings: Vec<String> = resolved.warnings.iter().map(ToString::to_string).collect();
    let settings: serde_json::Map<String, serde_json::Value> = resolved
        .settings
        .iter()
        .map(|(path, setting)| {
            (path.clone(), json!({"value": setting.value, "source": setting.source.to_string()}))
        })
        .collect();
    output.object(&json!({"file": path, "ok": true, "warnings": warnings, "settings": settings}))
}
