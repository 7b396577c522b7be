//! `report.md`: the report as plain text with tables.

use std::fmt::Write;

use super::extra_metrics;
use super::metric::{METRICS, Metric};
use super::outcome::Outcome;

/// The report.
pub fn report(outcome: &Outcome) -> String {
    let mut out = format!("# {}\n\n{}\n\n", outcome.title, outcome.finding());
    for problem in failures(outcome) {
        let _ = writeln!(out, "**{problem}**\n");
    }
    out.push_str(&table(outcome));
    let metric = outcome.comparison.metric.metric();
    let base = outcome.comparison.base_in_words();
    let _ = writeln!(out, "\n## Differences to {base}, {}\n", metric.label());
    out.push_str("| arm | mean | 95 % interval | n | seed by seed |\n|---|---|---|---|---|\n");
    for row in difference_rows(outcome, metric) {
        let _ = writeln!(out, "| {} |", row.join(" | "));
    }
    out.push_str("\n## Further numbers\n\n");
    let head = extra_metrics::head(outcome);
    out.push_str(&format!("{}|{}\n", row(&head), "---|".repeat(head.len())));
    for cells in extra_metrics::rows(outcome) {
        out.push_str(&row(&cells));
    }
    out.push_str("\n## Every run\n\n");
    out.push_str(&row(&run_head(outcome)));
    out.push_str(&format!("|{}\n", "---|".repeat(run_head(outcome).len())));
    for cells in run_rows(outcome) {
        out.push_str(&row(&cells));
    }
    let _ = writeln!(out, "\n## Where and how\n");
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
    format!("| {} |\n", cells.join(" | "))
}

fn table(outcome: &Outcome) -> String {
    let metrics = shown_metrics(outcome);
    let mut out =
        format!("| arm | n |{}\n", metrics.iter().map(|metric| format!(" {} |", metric.label())).collect::<String>());
    out.push_str(&format!("|---|---|{}\n", "---|".repeat(metrics.len())));
    for (at, arm) in outcome.arms.iter().enumerate() {
        let n = arm.runs.iter().filter(|run| run.end.is_ok()).count();
        let cells = metrics.iter().map(|metric| metric.spread(outcome.summary(at, metric)));
        out.push_str(&row(&[arm.name.clone(), n.to_string()].into_iter().chain(cells).collect::<Vec<_>>()));
    }
    out
}

/// The numbers that some run has.
pub fn shown_metrics(outcome: &Outcome) -> Vec<Metric> {
    let has = |metric: &Metric| (0..outcome.arms.len()).any(|arm| !outcome.values(arm, metric).is_empty());
    outcome.metrics().into_iter().filter(has).collect()
}

/// Arm, mean difference to the base arm, interval, n, and every difference.
pub fn difference_rows(outcome: &Outcome, metric: &Metric) -> Vec<[String; 5]> {
    let signed = |value: f64| format!("{:+.*}", metric.decimals, value * metric.factor);
    let mut rows = Vec::new();
    for (arm, base) in outcome.pairs(0..outcome.arms.len()) {
        let name = outcome.arms[arm].name.clone();
        let Some(difference) = outcome.difference(arm, base, metric) else {
            rows.push([name, "–".into(), "–".into(), "0".into(), "no pair of finished runs".into()]);
            continue;
        };
        let interval = difference.interval().map(|(low, high)| format!("{} to {}", signed(low), signed(high)));
        let single = outcome.differences(arm, base, metric);
        let single = single.iter().map(|(seed, value)| format!("{} (seed {seed})", signed(*value)));
        let single = single.collect::<Vec<_>>().join(", ");
        let interval = interval.unwrap_or_else(|| "none from one seed".into());
        rows.push([name, signed(difference.mean), interval, difference.n.to_string(), single]);
    }
    rows
}

/// The head of the table of all runs.
pub fn run_head(outcome: &Outcome) -> Vec<String> {
    ["arm".to_owned(), "seed".to_owned()].into_iter().chain(outcome.metrics()[..6].iter().map(Metric::label)).collect()
}

/// Every run with its numbers; a failed one with why.
pub fn run_rows(outcome: &Outcome) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for arm in &outcome.arms {
        for run in &arm.runs {
            let mut cells = vec![arm.name.clone(), run.seed.to_string()];
            match &run.end {
                Ok(result) => cells.extend(METRICS[..6].iter().map(|metric| {
                    (metric.of)(result, outcome.swept()).map_or("–".into(), |value| metric.shown(value))
                })),
                Err(problem) => {
                    cells.push(format!("FAILED: {}", problem.lines().last().unwrap_or_default()));
                    cells.resize(run_head(outcome).len(), String::new());
                }
            }
            rows.push(cells);
        }
    }
    rows
}

/// What a reader must know to read the numbers.
pub fn notes(outcome: &Outcome) -> Vec<String> {
    let comparison = &outcome.comparison;
    let mut notes = Vec::new();
    if let Some(result) = outcome.results().next() {
        let steps = polyhead_runs::text::thousands(result.steps);
        let tokens = outcome.in_units(&format!("{} tokens", polyhead_runs::text::thousands(result.tokens)));
        notes.push(format!("Data: {}. Every run takes {steps} steps, {tokens}.", result.data));
    }
    if comparison.same_data {
        notes.push("Runs of one seed see the same data in the same order.".into());
    }
    if !outcome.prepared.is_empty() {
        notes.push(format!(
            "Made before, for every seed anew (here seed {}): {}.",
            comparison.seeds[0],
            outcome.prepared.join("; ")
        ));
    }
    let matched = comparison.matched;
    let found: Vec<String> = outcome
        .arms
        .iter()
        .filter_map(|arm| {
            let found = arm.matched.as_ref()?;
            Some(format!("{}: {} = {} ({:+.2} %)", arm.name, found.key, found.value, 100.0 * found.deviation()))
        })
        .collect();
    if !found.is_empty() {
        let base = comparison.base_in_words();
        notes.push(format!(
            "Equal {}: the arms were made to cost what {base} costs. {}.",
            matched.words(),
            found.join("; ")
        ));
    }
    if outcome.swept() {
        let mut words = String::from(
            "Each arm was trained with every value of the sweep. Its value was chosen on the first half of the held-out \
             batches (mean over seeds); the scores here are of the other half.",
        );
        for arm in &outcome.arms {
            let metric = comparison.metric.metric();
            let list = arm.considered.iter().map(|(words, summary)| match summary {
                Some(summary) => format!("{words} ({})", metric.shown(summary.mean)),
                None => format!("{words} (a run failed)"),
            });
            let _ = write!(words, " {}: {}; chosen {}.", arm.name, list.collect::<Vec<_>>().join(", "), arm.choice);
        }
        notes.push(words);
    }
    notes.push(
        "Numbers are mean ± standard deviation over seeds. Intervals are 95 % of Student's t over paired differences; they \
         are not corrected for looking at several arms."
            .into(),
    );
    notes
}

/// Runs that failed, each with why; what the numbers lack.
pub fn failures(outcome: &Outcome) -> Vec<String> {
    let mut failures = Vec::new();
    for arm in &outcome.arms {
        let own = arm.runs.iter().filter_map(|run| Some((format!("seed {}", run.seed), run.end.as_ref().err()?)));
        let elsewhere = arm.failed_elsewhere.iter().map(|(which, problem)| (which.clone(), problem));
        for (which, problem) in own.chain(elsewhere) {
            let why = problem.lines().last().unwrap_or_default().trim_start_matches("error: ");
            failures.push(format!("FAILED, and not in any mean: {}, {which}: {why}", arm.name));
        }
    }
    failures
}

/// Where the runs ran.
pub fn environment(outcome: &Outcome) -> Vec<String> {
    let mut lines: Vec<String> = outcome
        .environments()
        .into_iter()
        .map(|found| {
            let build = if found.release_build { "release build" } else { "debug build, whose speed says nothing" };
            let processor = found.processor.as_deref().unwrap_or("processor unknown");
            format!(
                "Polyhead {} ({build}), device {}, {} threads a run, {} ({}), {}",
                found.version, found.device, found.threads, processor, found.instruction_set, found.system
            )
        })
        .collect();
    lines
        .push("Speed is of the steps alone, without validation and saving; other work on the machine slows it.".into());
    lines
}
