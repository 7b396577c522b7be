//! The tables of a report as cells of text, which `report.md` and `report.html` show alike.

use super::best_of::BestOf;
use super::extra_metrics::{Further, further};
use super::ladder::ArmLadder;
use super::metric::{METRICS, Metric};
use super::outcome::{Considered, Outcome};
use super::statistics::{EffectSize, Summary};
use super::verdict::{shown_p, shown_seeds};

/// How many of [`METRICS`] the table of all runs has: the others are the same for all runs of an arm.
const OF_RUNS: usize = 6;
/// Where there is no number.
const NONE: &str = "–";

/// A table with its heading.
pub struct Table {
    /// What is above it.
    pub title: String,
    /// Of a long table what is shown until it is opened.
    pub folded: Option<String>,
    /// The names of its columns.
    pub head: Vec<String>,
    /// Its cells.
    pub rows: Vec<Vec<String>>,
}

/// All tables, in their order.
pub fn tables(outcome: &Outcome) -> Vec<Table> {
    let comparison = &outcome.comparison;
    let mut tables = vec![numbers(outcome), differences(outcome)];
    if comparison.chooses() {
        tables.extend([best_of(outcome), trials(outcome)]);
    }
    if comparison.ladder.is_some() {
        tables.push(laws(outcome));
    }
    tables.push(last_logged(outcome));
    tables.extend(effect_sizes(outcome));
    tables.push(runs(outcome));
    tables
}

/// A column for each arm, behind a first one.
fn arms(first: &str, outcome: &Outcome) -> Vec<String> {
    [first.to_owned()].into_iter().chain(outcome.arms.iter().map(|arm| arm.name.clone())).collect()
}

/// Means and spreads of the numbers that some run has.
fn numbers(outcome: &Outcome) -> Table {
    let has = |metric: &Metric| (0..outcome.arms.len()).any(|arm| !outcome.values(arm, metric).is_empty());
    let metrics: Vec<Metric> = outcome.metrics().into_iter().filter(has).collect();
    let rows = outcome.arms.iter().enumerate().map(|(at, arm)| {
        let n = arm.runs.iter().filter(|run| run.end.is_ok()).count();
        let cells = metrics.iter().map(|metric| metric.spread(outcome.summary(at, metric)));
        [arm.name.clone(), n.to_string()].into_iter().chain(cells).collect()
    });
    let head = ["arm", "n"].map(String::from).into_iter().chain(metrics.iter().map(Metric::label)).collect();
    Table { title: "All numbers".into(), folded: None, head, rows: rows.collect() }
}

/// Hedges' g of every arm against its base arm, for the comparison's metric and all further numbers; `None` where every arm has one
/// seed.
fn effect_sizes(outcome: &Outcome) -> Option<Table> {
    let metric = outcome.comparison.metric.metric().clone();
    let values = (0..outcome.arms.len()).map(|arm| outcome.values(arm, &metric)).collect();
    let pairs: Vec<(usize, usize)> = outcome.pairs(0..outcome.arms.len()).collect();
    let row = |Further { metric, values }: Further| {
        let plain = |arm: usize| values[arm].iter().map(|(_, value)| *value).collect::<Vec<f64>>();
        let effects: Vec<Option<EffectSize>> =
            pairs.iter().map(|&(arm, base)| EffectSize::between(&plain(arm), &plain(base))).collect();
        let shown = |effect: &Option<EffectSize>| effect.map_or(NONE.into(), |effect| format!("{:+.2}", effect.g()));
        let some = effects.iter().any(Option::is_some);
        some.then(|| [metric.title.to_string()].into_iter().chain(effects.iter().map(shown)).collect())
    };
    let all = [Further { metric, values }].into_iter().chain(further(outcome));
    let rows: Vec<Vec<String>> = all.filter_map(row).collect();
    let arms = pairs.iter().map(|&(arm, _)| outcome.arms[arm].name.clone());
    let head = ["at the end".to_owned()].into_iter().chain(arms).collect();
    let title = format!("Effect sizes against {}, Hedges' g", outcome.comparison.base_in_words());
    (!rows.is_empty()).then(|| Table { title, folded: Some("Of all numbers".into()), head, rows })
}

/// Every arm's difference to the base arm: its mean and interval, how likely it is by chance alone and among all arms, how many
/// seeds it would need, and every seed.
fn differences(outcome: &Outcome) -> Table {
    const HEAD: [&str; 8] =
        ["arm", "mean difference", "95 % interval", "p", "p, Holm", "n", "seeds for 80 %", "seed by seed"];
    let metric = outcome.comparison.metric.metric();
    let signed = |value: f64| format!("{:+.*}", metric.decimals, value * metric.factor);
    let mut rows = Vec::new();
    for found in outcome.compared() {
        let name = outcome.arms[found.arm].name.clone();
        let Some(difference) = found.difference else {
            let cells = [&*name, NONE, NONE, NONE, NONE, "0", NONE, "no pair of finished runs"];
            rows.push(cells.map(String::from).to_vec());
            continue;
        };
        let interval = difference.interval().map(|(low, high)| format!("{} to {}", signed(low), signed(high)));
        let single = outcome.differences(found.arm, found.base, metric);
        let single = single.iter().map(|(seed, value)| format!("{} (seed {seed})", signed(*value)));
        rows.push(vec![
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
    let title = format!("Differences to {}, {}", outcome.comparison.base_in_words(), metric.label());
    Table { title, folded: None, head: HEAD.map(String::from).to_vec(), rows }
}

/// The expected best of 1, 2, 4, ... trials and of all of them, with its interval, for each arm.
fn best_of(outcome: &Outcome) -> Table {
    let (quality, metric) = (outcome.comparison.metric, outcome.comparison.metric.metric());
    let found: Vec<_> = outcome.arms.iter().map(|arm| arm.expected_best(quality)).collect();
    let most = found.iter().flatten().map(|best| best.trials).max().unwrap_or(0);
    let rows = (1..=most).filter(|k| k.is_power_of_two() || *k == most);
    let cell = |of: &Vec<BestOf>, k: usize| match of.iter().find(|best| best.trials == k) {
        Some(best) => {
            format!("{} ({} to {})", metric.shown(best.mean), metric.shown(best.low), metric.shown(best.high))
        }
        None => NONE.into(),
    };
    let rows = rows.map(|k| [k.to_string()].into_iter().chain(found.iter().map(|of| cell(of, k))).collect());
    let title = format!("Expected best of so many trials, {}", metric.label());
    Table { title, folded: None, head: arms("trials", outcome), rows: rows.collect() }
}

/// What every arm reached with every setting that was tried.
fn trials(outcome: &Outcome) -> Table {
    let metric = outcome.comparison.metric.metric();
    let settings = outcome.arms.first().map_or(&[][..], |arm| &arm.considered);
    let row = |(at, setting): (usize, &Considered)| {
        let cells = outcome.arms.iter().map(|arm| arm.considered.get(at).map_or(NONE.into(), |it| tried(it, metric)));
        [setting.words.clone()].into_iter().chain(cells).collect()
    };
    let rows = settings.iter().enumerate().map(row).collect();
    let title = format!("Every setting that was tried, {} on the half that chooses", metric.label());
    Table { title, folded: Some(format!("All {} settings", settings.len())), head: arms("setting", outcome), rows }
}

/// What a setting reached on the half that chooses.
pub fn tried(setting: &Considered, metric: &Metric) -> String {
    setting.selection.map_or("a run failed".into(), |reached| metric.shown(reached.mean))
}

/// The power law of every arm.
fn laws(outcome: &Outcome) -> Table {
    const HEAD: [&str; 6] =
        ["arm", "exponent", "95 % interval", "irreducible", "runs", "value at the geometric mean of the FLOPs"];
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
            Err(problem) => [&*name, NONE, &format!("none: {problem}"), NONE, NONE, NONE].map(String::from).to_vec(),
        }
    });
    let title = "Power laws over training FLOPs".into();
    Table { title, folded: None, head: HEAD.map(String::from).to_vec(), rows: rows.collect() }
}

/// Numbers that are not of every run, each with how many runs have one where not all do.
fn last_logged(outcome: &Outcome) -> Table {
    let rows = further(outcome).into_iter().map(|further| {
        let cells = further.values.iter().zip(&outcome.arms).map(|(values, arm)| {
            let all = arm.runs.iter().filter(|run| run.end.is_ok()).count();
            let summary = Summary::of(&values.iter().map(|(_, value)| *value).collect::<Vec<_>>());
            match values.len() {
                some if (1..all).contains(&some) => {
                    format!("{} ({some} of {all} runs)", further.metric.spread(summary))
                }
                _ => further.metric.spread(summary),
            }
        });
        [further.metric.title.to_string()].into_iter().chain(cells).collect()
    });
    let folded = Some("What runs logged last".into());
    Table { title: "Further numbers".into(), folded, head: arms("at the end", outcome), rows: rows.collect() }
}

/// Every run with its numbers; a failed one with why.
fn runs(outcome: &Outcome) -> Table {
    let labels = outcome.metrics().into_iter().take(OF_RUNS).map(|metric| metric.label());
    let head: Vec<String> = ["arm", "seed"].map(String::from).into_iter().chain(labels).collect();
    let mut rows = Vec::new();
    for arm in &outcome.arms {
        for run in &arm.runs {
            let mut cells = vec![arm.name.clone(), run.seed.to_string()];
            match &run.end {
                Ok(result) => cells.extend(METRICS[..OF_RUNS].iter().map(|metric| {
                    (metric.of)(result, outcome.comparison.chooses()).map_or(NONE.into(), |value| metric.shown(value))
                })),
                Err(problem) => {
                    cells.push(format!("FAILED: {}", problem.lines().last().unwrap_or_default()));
                    cells.resize(head.len(), String::new());
                }
            }
            rows.push(cells);
        }
    }
    Table { title: "Every run".into(), folded: Some(format!("All {} runs", rows.len())), head, rows }
}
