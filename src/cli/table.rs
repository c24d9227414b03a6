use comfy_table::{CellAlignment, Table, presets};

/// A table without rules and rows. Those of its columns that are numbers, by their places, are aligned to the right.
pub(super) fn table<const N: usize>(header: [&str; N], numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for &place in numbers {
        if let Some(column) = table.column_mut(place) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
