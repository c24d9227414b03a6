use sarai_core::request::Tool;
use serde::Serialize;

/// A tool as both protocols describe it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct WireTool<'a> {
    r#type: &'static str,
    function: &'a Tool,
}

impl<'a> From<&'a Tool> for WireTool<'a> {
    fn from(tool: &'a Tool) -> Self {
        Self { r#type: "function", function: tool }
    }
}
