//! Tables for people.

/// The first row is the head; `right`: which columns are numbers.
pub(crate) fn aligned<const COLUMNS: usize>(rows: &[[String; COLUMNS]], right: [bool; COLUMNS]) -> String {
    let widths: [usize; COLUMNS] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
    });
    let line = |row: &[String; COLUMNS]| {
        let cells = row.iter().zip(widths).zip(right).map(|((cell, width), right)| {
            if right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rule = widths.map(|width| "-".repeat(width));
    rows.iter().take(1).chain([&rule]).chain(rows.iter().skip(1)).map(line).collect()
}
