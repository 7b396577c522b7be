//! `polyhead heads ablate` of a classifier: what every head does for the classes, and how far it looks.

use polyhead_evaluation::head_importance::{Importance, importance, rank_correlation};
use polyhead_evaluation::head_sets::HeadOf;
use polyhead_experiments::page::table;
use polyhead_models::{Body, Examples};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::classifier::TrainedClassifier;
use serde_json::json;

use super::AblateArgs;
use crate::console::progress;
use crate::head_report::{Report, most, number};
use crate::heads::named;
use crate::probe::{choose, folder};

/// Examples where nothing is said; chosen by us.
const EXAMPLES: u64 = 64;

/// Writes the table.
pub fn ablate(args: &AblateArgs, trained: &TrainedClassifier) -> Result<(), Failure> {
    let refused = |problem: String| Err(Problems::plain(problem).into());
    let Body::Encoder(encoder) = &trained.model.body else {
        return refused(format!(
            "{} has no attention heads: heads are switched off in transformers",
            trained.path.display()
        ));
    };
    for (given, option) in [(!args.text.is_empty(), "--text"), (args.write_means.is_some(), "--write-means")] {
        if given {
            return refused(format!(
                "{option} is for decoders: of a classifier, held-out examples are measured, heads are zeroed"
            ));
        }
    }
    let (batches, examples) = held_out(trained, args.rows.map_or(EXAMPLES, u64::from))?;
    let all = importance(encoder, &batches, &mut |done, all| progress("switching off heads", done, all));
    let mut heads: Vec<HeadOf> = Vec::new();
    for layer in choose("--layers", &args.layers, all.len())? {
        let chosen = choose("--heads", &args.heads, all[layer].len())?;
        heads.extend(chosen.into_iter().map(|head| (layer, head)));
    }
    let found: Vec<&Importance> = heads.iter().map(|&(layer, head)| &all[layer][head]).collect();
    let column = |of: fn(&Importance) -> f64| found.iter().map(|head| Some(of(head))).collect::<Vec<_>>();
    let distances = found.iter().map(|head| head.reach.as_ref().map(|reach| reach.mean_distance)).collect();
    let columns = vec![
        ("true_class_drop", column(|head| head.drop)),
        ("jensen_shannon", column(|head| head.divergence)),
        ("accuracy_drop", column(|head| head.accuracy_drop)),
        ("embedding_change", column(|head| head.embedding_change)),
        ("gate", column(|head| head.gate)),
        ("distance", distances),
    ];
    let numbers = |of: fn(&Importance) -> f64| found.iter().map(|head| of(head)).collect::<Vec<_>>();
    let correlation =
        (found.len() > 1).then(|| rank_correlation(&numbers(|head| head.divergence), &numbers(|head| head.gate)));
    let mut finding = most(&heads, &columns[1].1).map_or_else(String::new, |(head, divergence)| {
        format!("Head {} matters most: without it probabilities move by {divergence:.4} nats.", named(head))
    });
    if let Some(told) = correlation {
        finding += &format!(
            " The gradient of gates orders heads as switching them off does with a rank correlation of {told:.2}."
        );
    }
    let more = json!({ "checkpoint": trained.path, "examples": examples,
        "rank_correlation_of_gate_and_divergence": correlation, "profiles": profiles(&heads, &found) });
    let report = Report {
        title: format!("Heads switched off: {}", trained.path.display()),
        finding,
        about: about(examples),
        columns,
        more: more.as_object().cloned().unwrap_or_default(),
        body: body(&heads, &found),
        heads,
    };
    report.write(&folder(args.out.as_deref(), &trained.path, "heads")?, "ablation")
}

/// Whole batches of held-out examples until there are so many, and how many these are.
fn held_out(trained: &TrainedClassifier, least: u64) -> Result<(Vec<Examples>, u64), Failure> {
    let validation = trained.data()?.validation;
    let (mut batches, mut examples) = (Vec::new(), 0);
    for at in 0..validation.batches_per_epoch() {
        if examples >= least {
            break;
        }
        let batch = validation.batch(at)?;
        examples += batch.labels.len() as u64;
        batches.push(batch);
    }
    Ok((batches, examples))
}

/// The weight of heads by distance, of those that have maps.
fn profiles(heads: &[HeadOf], found: &[&Importance]) -> serde_json::Value {
    let profile = |(&(layer, head), of): (&HeadOf, &&Importance)| {
        let reach = of.reach.as_ref()?;
        Some(json!({ "layer": layer, "head": head, "weight": reach.profile, "renormalised": reach.renormalised }))
    };
    heads.iter().zip(found).filter_map(profile).collect()
}

/// The same as a table.
fn body(heads: &[HeadOf], found: &[&Importance]) -> String {
    let farthest = found.iter().filter_map(|head| Some(head.reach.as_ref()?.profile.len())).max();
    let Some(farthest) = farthest else { return String::new() };
    let row = |(&head, of): (&HeadOf, &&Importance)| {
        let weights = of.reach.as_ref()?.profile.iter().map(|&weight| number(Some(weight)));
        Some([named(head)].into_iter().chain(weights).collect())
    };
    let rows = heads.iter().zip(found).filter_map(row).collect();
    let head: Vec<String> =
        ["head".to_owned()].into_iter().chain((0..farthest).map(|steps| steps.to_string())).collect();
    format!("<h2>Weight by distance</h2>\n{}", table(&head, rows))
}

fn about(examples: u64) -> String {
    format!(
        "What changes over {examples} held-out examples once a head writes nothing (after arXiv 2303.13731, whose code is not \
         published). true_class_drop: how much less probable the label is. jensen_shannon: between the probabilities with and without \
         it, in nats, ln 2 at most. accuracy_drop: how much less often the label is the first choice. embedding_change: one minus the \
         cosine between what the last layer reads with and without it. gate: mean size of the gradient of a gate of 1 on the head. \
         distance: the larger step across or down between patches, by the weights among patches; there is none where a mechanism has \
         no map, or inputs are no images."
    )
}
