//! The table, and the same as JSON.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::Result;
use crate::machine::Machine;

/// One comparison: sarai's figure, the one that it is held against, and the bar for their ratio.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    /// What was measured, and how.
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) ours: f64,
    /// What it is compared with.
    pub(crate) against: String,
    pub(crate) theirs: f64,
    pub(crate) bar: Bar,
}

/// What the ratio of the two figures, or with `Value` the figure itself, has to be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bar {
    RatioAtLeast(f64),
    RatioAtMost(f64),
    ValueAtMost(f64),
}

impl Figure {
    fn ratio(&self) -> f64 {
        self.ours / self.theirs
    }

    fn holds(&self) -> bool {
        match self.bar {
            Bar::RatioAtLeast(bar) => self.ratio() >= bar,
            Bar::RatioAtMost(bar) => self.ratio() <= bar,
            Bar::ValueAtMost(bar) => self.ours <= bar,
        }
    }
}

impl std::fmt::Display for Bar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RatioAtLeast(bar) => write!(f, "≥ {bar}"),
            Self::RatioAtMost(bar) => write!(f, "≤ {bar}"),
            Self::ValueAtMost(bar) => write!(f, "value ≤ {bar}"),
        }
    }
}

/// All figures, and what they were measured on.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    /// What it is compared with.
    peer: String,
    threads: usize,
    figures: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Entry {
    row: &'static str,
    #[serde(flatten)]
    figure: Figure,
    ratio: f64,
    holds: bool,
}

impl Report {
    pub(crate) fn new(machine: Machine, peer: String, threads: usize) -> Self {
        Self { machine, peer, threads, figures: Vec::new() }
    }

    pub(crate) fn add(&mut self, row: &'static str, figures: Vec<Figure>) {
        let entry = |figure: Figure| Entry { row, ratio: figure.ratio(), holds: figure.holds(), figure };
        self.figures.extend(figures.into_iter().map(entry));
    }

    pub(crate) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header(["row", "measured", "sarai", "against", "", "unit", "ratio", "bar", "holds"]);
        for Entry { row, figure, ratio, holds } in &self.figures {
            table.add_row([
                (*row).to_owned(),
                figure.what.clone(),
                shown(figure.ours),
                figure.against.clone(),
                shown(figure.theirs),
                figure.unit.to_owned(),
                shown(*ratio),
                figure.bar.to_string(),
                if *holds { "yes" } else { "no" }.to_owned(),
            ]);
        }
        for column in [2, 4, 6] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let Self { machine, peer, threads, .. } = self;
        format!("{machine}, {threads} threads per model; against {peer}\n\n{table}")
    }
}

/// Three digits or so.
fn shown(x: f64) -> String {
    match x.abs() {
        x_abs if x_abs >= 100.0 => format!("{x:.0}"),
        x_abs if x_abs >= 10.0 => format!("{x:.1}"),
        x_abs if x_abs >= 1.0 || x == 0.0 => format!("{x:.2}"),
        _ => format!("{x:.4}"),
    }
}
