//! `report.md`: the report as plain text with tables.

use std::fmt::Write;

use super::notes::{environment, failures, notes};
use super::outcome::Outcome;
use super::tables::{Table, tables};

/// The report.
pub fn report(outcome: &Outcome) -> String {
    let mut out = format!("# {}\n\n{}\n\n", outcome.title, outcome.finding());
    for problem in failures(outcome) {
        let _ = writeln!(out, "**{problem}**\n");
    }
    for warning in outcome.warnings() {
        let _ = writeln!(out, "**Beware:** {warning}\n");
    }
    for Table { title, head, rows, .. } in tables(outcome) {
        let _ = write!(out, "## {title}\n\n{}|{}\n", row(&head), "---|".repeat(head.len()));
        rows.iter().for_each(|cells| out.push_str(&row(cells)));
        out.push('\n');
    }
    out.push_str("## Where and how\n\n");
    for line in notes(outcome).into_iter().chain(environment(outcome)) {
        let _ = writeln!(out, "* {line}");
    }
    let _ = writeln!(out, "\n```sh\n{}\n```", outcome.command);
    for arm in &outcome.arms {
        let _ = writeln!(
            out,
            "\n<details><summary>Recipe of {}</summary>\n\n```toml\n{}```\n</details>",
            arm.name, arm.recipe
        );
    }
    out
}

fn row(cells: &[String]) -> String {
    format!("| {} |\n", cells.iter().map(|text| cell(text)).collect::<Vec<_>>().join(" | "))
}

/// Text for a cell of a table, which a bar would end.
pub fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use crate::simulation::{outcome, run};

    #[test]
    fn bars_in_names_end_no_cell() {
        let mut outcome = outcome(vec![vec![run(0, [1.0; 2])], vec![run(0, [2.0; 2])]], "");
        outcome.arms[1].name = "a|b".into();
        let report = super::report(&outcome);
        let columns = |line: &str| line.replace("\\|", "").matches('|').count();
        let tables: Vec<&str> = report.lines().filter(|line| line.starts_with('|')).collect();
        assert!(tables.iter().any(|line| line.contains("a\\|b")), "{report}");
        let ragged = tables.windows(2).find(|pair| columns(pair[0]) != columns(pair[1]) && pair[1].starts_with("|---"));
        assert_eq!(ragged, None);
        let own = tables.iter().find(|line| line.starts_with("| a\\|b | +1.0000")).map(|line| columns(line));
        assert_eq!(own, Some(9), "{report}");
    }
}
