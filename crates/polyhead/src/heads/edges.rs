//! `polyhead heads edges`: the edges between heads and feed-forward layers that carry a behaviour, and how much of it they keep alone.

use burn::module::Module;
use clap::Args;
use polyhead_evaluation::circuit::{Edge, heads, run_alone, top};
use polyhead_evaluation::edges::{EdgeScores, Reader, Steps, Writer, edge_scores, parts};
use polyhead_evaluation::patching::{Runs, effect, groups};
use polyhead_experiments::page::table;
use polyhead_models::{Decoder, PromptPair};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use serde_json::{Value, json};

use super::{OnPairs, Opened, mean, named, told_apart};
use crate::console::progress;
use crate::head_report::{Report, number};

/// Bytes that the gradients of all parts may take at a time (chosen by us).
const BYTES: usize = 1 << 30;

/// How edges are scored.
#[derive(Debug, Args)]
pub struct EdgesArgs {
    #[command(flatten)]
    on: OnPairs,
    /// Points between corrupt and clean embeddings at which gradients are taken (EAP-IG); 0 takes those of the clean run alone (EAP).
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Take the points of the released code, which begin at the corrupt end; those of the paper end at the clean one.
    #[arg(long)]
    released: bool,
    /// Edges of the circuits that are run alone.
    #[arg(long, value_delimiter = ',', default_value = "10,30,100,300,1000", value_parser = crate::cli::at_least_one)]
    top: Vec<usize>,
}

/// Scores the edges and runs the largest.
pub fn edges(args: &EdgesArgs) -> Result<(), Failure> {
    let Opened { trained, pairs, out } = args.on.open()?;
    let steps = match (args.steps, args.released) {
        (0, _) => Steps::Clean,
        (steps, true) => Steps::FromCorrupt(steps),
        (steps, false) => Steps::ToClean(steps),
    };
    let model = &trained.model;
    let n_heads = Runs::new(model, &pairs[..1]).heads(0);
    let parts = parts(model.layers.len(), n_heads);
    let per_token = 3 * 4 * model.config().d_model * (parts.0.len() + parts.1.len());
    let groups = groups(&pairs, (BYTES / per_token.max(1)).max(1));
    let scores = scores(model, &groups, steps).ok_or_else(|| {
        let path = trained.path.display();
        Problems::plain(format!(
            "{path}: edges are scored in models of softmax attention alone, whose layers have as many heads and come one after \
             the other; heads patch takes every mechanism"
        ))
    })?;
    let ends = told_apart(ends(model, &groups))?;
    let circuits: Vec<Circuit> = (args.top.iter().enumerate())
        .map(|(at, &count)| {
            let edges = top(&scores, &parts, count);
            let alone: Vec<f64> =
                groups.iter().flat_map(|group| run_alone(model, group, &edges).unwrap_or_default()).collect();
            progress("running circuits", at as u64 + 1, args.top.len() as u64);
            // From the corrupt end, which no edge at all gives.
            Circuit { count, kept: 1.0 - effect(mean(&alone), ends), edges: edges.into_iter().collect() }
        })
        .collect();
    report(&trained.path, &scores, &parts, (&circuits, ends), pairs.len()).write(&out, "edges")
}

/// The scores over all groups.
fn scores(model: &Decoder, groups: &[Vec<PromptPair>], steps: Steps) -> Option<EdgeScores> {
    let trained = model.clone().fork(&model.device().autodiff()).train();
    let all: usize = groups.iter().map(Vec::len).sum();
    let mut sum: Option<EdgeScores> = None;
    for (number, group) in groups.iter().enumerate() {
        let mut own = edge_scores(&trained, group, steps)?;
        let share = group.len() as f64 / all as f64;
        own.edges.iter_mut().flatten().chain(&mut own.nodes).for_each(|score| *score *= share);
        sum = Some(match sum {
            None => own,
            Some(mut sum) => {
                let more = own.edges.into_iter().flatten().chain(own.nodes);
                sum.edges.iter_mut().flatten().chain(&mut sum.nodes).zip(more).for_each(|(sum, more)| *sum += more);
                sum
            }
        });
        progress("scoring edges", number as u64 + 1, groups.len() as u64);
    }
    sum
}

/// The mean differences of logits of the clean and the corrupt prompts.
fn ends(model: &Decoder, groups: &[Vec<PromptPair>]) -> [f64; 2] {
    let mut all: [Vec<f64>; 2] = Default::default();
    for group in groups {
        let differences = Runs::new(model, group).differences;
        all.iter_mut().zip(differences).for_each(|(all, own)| all.extend(own));
    }
    all.map(|side| mean(&side))
}

/// A circuit that was run alone.
struct Circuit {
    /// Edges that were asked for; those that lead nowhere are left out.
    count: usize,
    /// Its faithfulness.
    kept: f64,
    edges: Vec<Edge>,
}

fn of_writer(writer: Writer) -> String {
    match writer {
        Writer::Input => "input".into(),
        Writer::Head(layer, head) => named((layer, head)),
        Writer::Mlp(layer) => format!("mlp {layer}"),
    }
}

fn of_reader(reader: Reader) -> String {
    match reader {
        Reader::Head(layer, head, kind) => format!("{} {}", named((layer, head)), ["q", "k", "v"][kind]),
        Reader::Mlp(layer) => format!("mlp {layer}"),
        Reader::Logits => "logits".into(),
    }
}

fn report(
    path: &std::path::Path,
    scores: &EdgeScores,
    parts: &(Vec<Writer>, Vec<Reader>),
    (circuits, [clean, corrupt]): (&[Circuit], [f64; 2]),
    pairs: usize,
) -> Report {
    let score = |(writer, reader): &Edge| {
        let of = parts.0.iter().position(|other| other == writer).zip(parts.1.iter().position(|other| other == reader));
        of.map_or(0.0, |(writer, reader)| scores.edges[writer][reader])
    };
    let largest = circuits.iter().max_by_key(|circuit| circuit.count);
    let mut listed: Vec<(&Edge, f64)> =
        largest.iter().flat_map(|circuit| &circuit.edges).map(|edge| (edge, score(edge))).collect();
    listed.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
    let edge =
        |(edge, score): &(&Edge, f64)| json!({ "from": of_writer(edge.0), "to": of_reader(edge.1), "score": score });
    let of_circuit = |circuit: &Circuit| {
        let heads: Vec<Value> =
            heads(&circuit.edges.iter().copied().collect()).into_iter().map(|head| json!(named(head))).collect();
        json!({ "asked": circuit.count, "edges": circuit.edges.len(), "faithfulness": circuit.kept, "heads": heads })
    };
    let more = json!({ "checkpoint": path, "pairs": pairs, "difference_clean": clean, "difference_corrupt": corrupt,
        "circuits": circuits.iter().map(of_circuit).collect::<Vec<_>>(), "edges": listed.iter().map(edge).collect::<Vec<_>>() });
    let row = |circuit: &Circuit| {
        let heads = heads(&circuit.edges.iter().copied().collect()).len();
        [circuit.count, circuit.edges.len(), heads]
            .map(|count| count.to_string())
            .into_iter()
            .chain([number(Some(circuit.kept))])
            .collect()
    };
    let head = ["asked for", "edges", "heads", "faithfulness"].map(String::from);
    let mut body = format!("<h2>Circuits</h2>\n{}", table(&head, circuits.iter().map(row).collect()));
    let cells = |(edge, score): &(&Edge, f64)| vec![of_writer(edge.0), of_reader(edge.1), number(Some(*score))];
    body += "<h2>The largest edges</h2>\n";
    body += &table(&["from", "to", "score"].map(String::from), listed.iter().take(40).map(cells).collect());
    let finding =
        circuits.iter().map(|circuit| format!("{} edges keep {:.0} %", circuit.edges.len(), 100.0 * circuit.kept));
    let finding =
        format!("Run alone, {} of the difference between clean and corrupt.", finding.collect::<Vec<_>>().join(", "));
    let nodes = parts.0.iter().zip(&scores.nodes).filter_map(|(writer, &score)| match writer {
        Writer::Head(layer, head) => Some(((*layer, *head), Some(score))),
        _ => None,
    });
    let (heads, nodes) = nodes.unzip();
    let about = format!(
        "node: (corrupt - clean output) · gradient at the output, mean over {pairs} pairs: what patching the head changes in the \
         difference of logits ({clean:.3} clean, {corrupt:.3} corrupt) to first order. Edges: the same at what a part reads (EAP: Syed \
         et al. 2023, arXiv 2310.10348; EAP-IG: Hanna et al. 2024, arXiv 2403.17806). Faithfulness: how much of the difference stays \
         where all other edges carry what they carry in the corrupt run."
    );
    let title = format!("Edges: {}", path.display());
    let more = more.as_object().cloned().unwrap_or_default();
    Report { title, finding, about, heads, columns: vec![("node", nodes)], more, body }
}
