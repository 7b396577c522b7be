//! `report.json`: what the report says, for programs.

use serde_json::{Value, json};

use super::extra_metrics::further;
use super::ladder::ArmLadder;
use super::metric::METRICS;
use super::outcome::{ArmOutcome, Considered, Outcome};
use super::statistics::Summary;
use super::verdict::Compared;

/// The report.
pub fn report(outcome: &Outcome) -> Value {
    let comparison = &outcome.comparison;
    let more = further(outcome);
    let arms = outcome.arms.iter().enumerate().map(|(at, arm)| {
        let every = METRICS.iter().map(|metric| (metric.key.to_string(), outcome.values(at, metric)));
        let more = more.iter().map(|further| (further.metric.key.to_string(), further.values[at].clone()));
        let values = every.chain(more).filter(|(_, values)| !values.is_empty()).map(|(key, values)| {
            let seeds = values.into_iter().map(|(seed, value)| json!({ "seed": seed, "value": value }));
            (key, seeds.collect::<Value>())
        });
        json!({
            "name": arm.name,
            "values": values.collect::<serde_json::Map<_, _>>(),
            "matched": arm.matched.as_ref().map(|found| json!({
                "key": found.key,
                "value": found.value,
                "deviation": found.deviation(),
            })),
            "tuning": comparison.chooses().then(|| tuning(outcome, arm)),
        })
    });
    json!({
        "title": outcome.title,
        "command": outcome.command,
        "finding": outcome.finding(),
        "warnings": outcome.warnings(),
        "metric": comparison.metric,
        "matched": comparison.matched,
        "seeds": comparison.seeds,
        "time_off": times_off(outcome),
        "arms": arms.collect::<Value>(),
        "laws": outcome.ladders().iter().map(|ladder| law(outcome, ladder)).collect::<Value>(),
        "differences": outcome.compared().iter().map(|found| difference(outcome, found)).collect::<Value>(),
    })
}

/// By which share the steps of each arm took longer than those of its base, where the time was to be equal.
fn times_off(outcome: &Outcome) -> serde_json::Map<String, Value> {
    outcome.times_off().into_iter().map(|(arm, off)| (outcome.arms[arm].name.clone(), off.into())).collect()
}

fn summary(summary: Summary) -> Value {
    let [low, high] = summary.interval().map_or([None; 2], |(low, high)| [Some(low), Some(high)]);
    json!({ "n": summary.n, "mean": summary.mean, "deviation": summary.deviation, "low": low, "high": high })
}

fn difference(outcome: &Outcome, found: &Compared) -> Value {
    json!({
        "arm": outcome.arms[found.arm].name,
        "base": outcome.arms[found.base].name,
        "difference": found.difference.map(summary),
        "p": found.p,
        "p_holm": found.corrected,
        "seeds_needed": found.seeds_needed(),
        "verdict": found.verdict,
    })
}

/// An arm over the rungs of a ladder.
fn law(outcome: &Outcome, ladder: &ArmLadder) -> Value {
    let rungs = ladder.rungs.iter().map(|(flops, values)| json!({ "flops": flops, "values": values }));
    json!({
        "arm": outcome.comparison.plain_name(ladder.arm),
        "rungs": rungs.collect::<Value>(),
        "law": ladder.law.as_ref().ok(),
        "problem": ladder.law.as_ref().err(),
    })
}

/// What an arm was tuned to, among what, and what fewer trials would have given.
fn tuning(outcome: &Outcome, arm: &ArmOutcome) -> Value {
    let considered = |it: &Considered| {
        json!({
            "setting": it.values.iter().cloned().collect::<toml::Table>(),
            "selection": it.selection.map(summary),
            "reporting": it.reporting.map(summary),
        })
    };
    json!({
        "chosen": arm.choice,
        "edges": arm.edges,
        "considered": arm.considered.iter().map(considered).collect::<Value>(),
        "expected_best": arm.expected_best(outcome.comparison.metric),
    })
}
