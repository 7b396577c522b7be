//! `report.md`: the report as plain text with tables.

use std::fmt::Write;

use super::best_of::BestOf;
use super::comparison::Matched;
use super::extra_metrics;
use super::ladder::ArmLadder;
use super::metric::{METRICS, Metric};
use super::outcome::{Considered, Outcome};
use super::verdict::{shown_p, shown_seeds};

/// The report.
pub fn report(outcome: &Outcome) -> String {
    let mut out = format!("# {}\n\n{}\n\n", outcome.title, outcome.finding());
    for problem in failures(outcome) {
        let _ = writeln!(out, "**{problem}**\n");
    }
    for warning in outcome.warnings() {
        let _ = writeln!(out, "**Beware:** {warning}\n");
    }
    out.push_str(&table(outcome));
    let metric = outcome.comparison.metric.metric();
    let base = outcome.comparison.base_in_words();
    let _ = writeln!(out, "\n## Differences to {base}, {}\n", metric.label());
    out.push_str(&row(&DIFFERENCE_HEAD.map(String::from)));
    out.push_str(&format!("|{}\n", "---|".repeat(DIFFERENCE_HEAD.len())));
    for cells in difference_rows(outcome) {
        out.push_str(&row(&cells));
    }
    if outcome.comparison.chooses() {
        let _ = writeln!(out, "\n## Expected best of so many trials, {}\n", metric.label());
        let head = best_of_head(outcome);
        out.push_str(&format!("{}|{}\n", row(&head), "---|".repeat(head.len())));
        best_of_rows(outcome).iter().for_each(|cells| out.push_str(&row(cells)));
        let _ = writeln!(out, "\n## Every setting that was tried, {} on the half that chooses\n", metric.label());
        let head = trial_head(outcome);
        out.push_str(&format!("{}|{}\n", row(&head), "---|".repeat(head.len())));
        trial_rows(outcome).iter().for_each(|cells| out.push_str(&row(cells)));
    }
    if outcome.comparison.ladder.is_some() {
        let head = LADDER_HEAD.map(String::from);
        let _ = write!(out, "\n## Power laws over training FLOPs\n\n{}|{}\n", row(&head), "---|".repeat(head.len()));
        ladder_rows(outcome).iter().for_each(|cells| out.push_str(&row(cells)));
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

/// The head of [`difference_rows`].
pub const DIFFERENCE_HEAD: [&str; 8] =
    ["arm", "mean difference", "95 % interval", "p", "p, Holm", "n", "seeds for 80 %", "seed by seed"];

/// Every arm's difference to the base arm: its mean and interval, how likely it is by chance alone and among all arms, how many
/// seeds it would need, and every seed.
pub fn difference_rows(outcome: &Outcome) -> Vec<[String; 8]> {
    let metric = outcome.comparison.metric.metric();
    let signed = |value: f64| format!("{:+.*}", metric.decimals, value * metric.factor);
    let mut rows = Vec::new();
    for found in outcome.compared() {
        let name = outcome.arms[found.arm].name.clone();
        let none = || "–".to_owned();
        let Some(difference) = found.difference else {
            rows.push([name, none(), none(), none(), none(), "0".into(), none(), "no pair of finished runs".into()]);
            continue;
        };
        let interval = difference.interval().map(|(low, high)| format!("{} to {}", signed(low), signed(high)));
        let single = outcome.differences(found.arm, found.base, metric);
        let single = single.iter().map(|(seed, value)| format!("{} (seed {seed})", signed(*value)));
        rows.push([
            name,
            signed(difference.mean),
            interval.unwrap_or_else(|| "none from one seed".into()),
            shown_p(found.p),
            shown_p(found.corrected),
            difference.n.to_string(),
            shown_seeds(found.seeds_needed()),
            single.collect::<Vec<_>>().join(", "),
        ]);
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
                    (metric.of)(result, outcome.comparison.chooses()).map_or("–".into(), |value| metric.shown(value))
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
        notes.push(match comparison.matched {
            _ if comparison.ladder.is_some() => format!("Data: {}. How long runs are, the ladder says.", result.data),
            Matched::Time => format!("Data: {}. A run of the base arm takes {steps} steps, {tokens}.", result.data),
            _ => format!("Data: {}. Every run takes {steps} steps, {tokens}.", result.data),
        });
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
    let took = outcome.times_off();
    if !took.is_empty() {
        let took = took.iter().map(|(arm, off)| format!("{}: {:+.2} %", outcome.arms[*arm].name, 100.0 * off));
        notes.push(format!(
            "Equal time: steps were timed beforehand, and the steps of each arm are as many as take as long. What they took in \
             the end, against the base arm: {}.",
            took.collect::<Vec<_>>().join("; ")
        ));
    }
    if comparison.chooses() {
        notes.push(how_chosen(outcome));
    }
    if let Some(ladder) = &comparison.ladder {
        let errors = if comparison.metric.grows() { "1 - " } else { "" };
        let best = if ladder.flops.is_empty() { "" } else { " It is about the best size at each budget." };
        notes.push(format!(
            "Power laws: {errors}{} = irreducible + scale * FLOPs^-exponent, by least squares over all seeds, where FLOPs are 3 times \
             those of forward passes over the tokens of a run.{best} Intervals are of the bootstrap over residuals.",
            comparison.metric.metric().title
        ));
    }
    notes.push(
        "Numbers are mean ± standard deviation over seeds. Intervals are 95 % of Student's t over paired differences, each by \
         itself; what is called better or worse also passes Holm's correction for all differences of the comparison (p, Holm, \
         below 0.05)."
            .into(),
    );
    notes.extend(outcome.power_note());
    notes
}

/// How the setting of each arm was chosen, and among which.
fn how_chosen(outcome: &Outcome) -> String {
    let (comparison, metric) = (&outcome.comparison, outcome.comparison.metric.metric());
    let mut words = match &comparison.tune {
        Some(tune) => {
            let seeds: Vec<String> = comparison.trial_seeds().iter().map(u64::to_string).collect();
            format!(
                "Every arm tried the same {} settings with the same budget (seed {}). Its setting was chosen on the first half of \
                 the held-out batches and trained anew with the seeds of the report; the scores here are of the other half.",
                tune.trials,
                seeds.join(", ")
            )
        }
        None => "Each arm was trained with every value of the sweep. Its value was chosen on the first half of the held-out batches \
                 (mean over seeds); the scores here are of the other half."
            .into(),
    };
    for arm in &outcome.arms {
        let _ = match comparison.tune {
            Some(_) => write!(words, " {}: chosen {}.", arm.name, arm.choice),
            None => {
                let list = arm.considered.iter().map(|it| format!("{} ({})", it.words, tried(it, metric)));
                write!(words, " {}: {}; chosen {}.", arm.name, list.collect::<Vec<_>>().join(", "), arm.choice)
            }
        };
    }
    words
}

/// What a setting reached on the half that chooses.
fn tried(setting: &Considered, metric: &Metric) -> String {
    setting.selection.map_or("a run failed".into(), |reached| metric.shown(reached.mean))
}

/// The head of [`trial_rows`]: the arms.
pub fn trial_head(outcome: &Outcome) -> Vec<String> {
    ["setting".to_owned()].into_iter().chain(outcome.arms.iter().map(|arm| arm.name.clone())).collect()
}

/// What every arm reached with every setting that was tried.
pub fn trial_rows(outcome: &Outcome) -> Vec<Vec<String>> {
    let metric = outcome.comparison.metric.metric();
    let settings = outcome.arms.first().map_or(&[][..], |arm| &arm.considered);
    let row = |(at, setting): (usize, &Considered)| {
        let cells = outcome.arms.iter().map(|arm| arm.considered.get(at).map_or("–".into(), |it| tried(it, metric)));
        [setting.words.clone()].into_iter().chain(cells).collect()
    };
    settings.iter().enumerate().map(row).collect()
}

/// The head of [`best_of_rows`]: the arms.
pub fn best_of_head(outcome: &Outcome) -> Vec<String> {
    ["trials".to_owned()].into_iter().chain(outcome.arms.iter().map(|arm| arm.name.clone())).collect()
}

/// The expected best of 1, 2, 4, ... trials and of all of them, with its interval, for each arm.
pub fn best_of_rows(outcome: &Outcome) -> Vec<Vec<String>> {
    let (quality, metric) = (outcome.comparison.metric, outcome.comparison.metric.metric());
    let found: Vec<_> = outcome.arms.iter().map(|arm| arm.expected_best(quality)).collect();
    let most = found.iter().flatten().map(|best| best.trials).max().unwrap_or(0);
    let rows = (1..=most).filter(|k| k.is_power_of_two() || *k == most);
    let cell = |of: &Vec<BestOf>, k: usize| match of.iter().find(|best| best.trials == k) {
        Some(best) => {
            format!("{} ({} to {})", metric.shown(best.mean), metric.shown(best.low), metric.shown(best.high))
        }
        None => "–".into(),
    };
    rows.map(|k| [k.to_string()].into_iter().chain(found.iter().map(|of| cell(of, k))).collect()).collect()
}

/// The head of [`ladder_rows`].
pub const LADDER_HEAD: [&str; 6] =
    ["arm", "exponent", "95 % interval", "irreducible", "runs", "value at the geometric mean of the FLOPs"];

/// The power law of every arm.
pub fn ladder_rows(outcome: &Outcome) -> Vec<Vec<String>> {
    let rows = outcome.ladders().into_iter().map(|ArmLadder { arm, law, .. }| {
        let name = outcome.comparison.plain_name(arm).to_owned();
        match law {
            Ok(law) => vec![
                name,
                format!("{:.4}", law.exponent),
                format!("{:.4} to {:.4}", law.interval[0], law.interval[1]),
                format!("{:.4}", law.irreducible),
                law.n.to_string(),
                format!("{:.4} at {:.2e}", law.at(law.middle), law.middle),
            ],
            Err(problem) => {
                let none = || "–".to_owned();
                vec![name, none(), format!("none: {problem}"), none(), none(), none()]
            }
        }
    });
    rows.collect()
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
