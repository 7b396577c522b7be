//! What a report says beside its figures and tables: which runs failed, how numbers came about, and where.

use std::fmt::Write;

use super::comparison::Matched;
use super::outcome::Outcome;
use super::tables::tried;

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
    notes.push(
        "Effect sizes are Hedges' g: the difference of the means over the pooled standard deviation, seeds as independent samples, \
         corrected for their number exactly (by the gamma function)."
            .into(),
    );
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
