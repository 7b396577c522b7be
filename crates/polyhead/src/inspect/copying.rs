//! Which heads copy the tokens that they read, and which suppress copies: by their weights, and on texts.

use polyhead_attention::QueryHead;
use polyhead_evaluation::copy_suppression::{Circuits, Keep, circuits, cspa, effective_embedding, head_runs};
use polyhead_evaluation::head_sets::{HeadOf, largest};
use polyhead_evaluation::weight_circuits::{Own, share};
use polyhead_models::{Batch, Decoder};
use polyhead_recipe::Problems;
use polyhead_runs::{Failure, Trained};
use serde_json::json;

use super::InspectArgs;
use crate::console::progress;
use crate::head_report::Report;
use crate::probe::{choose, folder, probe};

/// Ranks that count as copied or suppressed, as published.
const TOP: usize = 10;
/// Heads that are taken apart on texts, those that suppress most; chosen by us.
const STRONGEST: usize = 4;

/// Writes the table.
pub fn inspect(args: &InspectArgs, trained: Trained) -> Result<(), Failure> {
    // Weights are told of without any text.
    let rows = match args.text.is_empty() && trained.recipe.is_none() {
        true => Vec::new(),
        false => probe(&trained, &args.text, args.rows)?,
    };
    let texts = texts(&rows, trained.model.vocab_size());
    let path = trained.path;
    // What LoRA learned is part of the weights.
    let model = trained.model.merged();
    let vocab = model.vocab_size();
    let step = (vocab / args.tokens).max(1);
    let tokens: Vec<u32> = (0..vocab as u32).step_by(step).take(args.tokens).collect();
    let embedding = effective_embedding(&model);
    let (mut heads, mut found): (Vec<HeadOf>, Vec<Circuits>) = Default::default();
    let layers = choose("--layers", &args.layers, model.layers.len())?;
    for (at, &layer) in layers.iter().enumerate() {
        let Some(own) = circuits(&model, layer, &embedding, &tokens) else { continue };
        for head in choose("--heads", &args.heads, own.len())? {
            heads.push((layer, head));
            found.push(own[head].clone());
        }
        progress("reading weights", at as u64 + 1, layers.len() as u64);
    }
    if heads.is_empty() {
        let problem =
            format!("--copying: no layer of {} has heads with fixed weights of values and outputs", path.display());
        return Err(Problems::plain(problem).into());
    }
    let column = |of: &dyn Fn(&Circuits) -> f64| found.iter().map(|head| Some(of(head))).collect::<Vec<_>>();
    let below = |most: usize| move |own: &Own| own.from_below <= most;
    let suppressed = column(&|head| share(&head.ov, below(TOP)));
    let scores: Vec<(HeadOf, f64)> =
        heads.iter().zip(&suppressed).map(|(&head, share)| (head, share.unwrap_or_default())).collect();
    let explained = explained(&model, &texts, &heads, &scores);
    let columns = vec![
        ("suppressed", suppressed),
        ("lowest_twentieth", column(&|head| share(&head.ov, below(vocab.div_ceil(20))))),
        ("copied", column(&|head| share(&head.ov, |own| own.from_above <= TOP))),
        ("attends_predicted", column(&|head| share(&head.qk, |own| own.from_above <= 1))),
        ("explained", explained),
    ];
    let strongest =
        largest(&scores, 1).into_iter().next().zip(scores.iter().map(|(_, share)| *share).max_by(f64::total_cmp));
    let finding = strongest.map_or_else(String::new, |((layer, head), most)| {
        format!(
            "Head {layer}.{head} suppresses most: {:.0} % of tokens are among the {TOP} that reading them lowers most.",
            100.0 * most
        )
    });
    let about = format!(
        "Of {} tokens of {vocab}: suppressed (lowest_twentieth, copied): the share whose own logit is among the {TOP} (the twentieth, \
         the {TOP}) that the head lowers (lowers, raises) most by reading them, with the effective embedding behind the first \
         feed-forward layer; attends_predicted: the share that a query which predicts them attends to most of all tokens, at no \
         distance; by chance {:.4}. explained: 1 - KL(clean ‖ CSPA) / KL(clean ‖ mean) on {} texts, of the {STRONGEST} heads that \
         suppress most (McDougall et al. 2023, arXiv 2310.04625; attention of layer 0, biases and rotation are left out).",
        tokens.len(),
        TOP as f64 / vocab as f64,
        texts.len()
    );
    let more = json!({ "checkpoint": path, "tokens": tokens.len(), "vocabulary": vocab });
    let more = more.as_object().cloned().unwrap_or_default();
    let title = format!("Copying and suppression: {}", path.display());
    let out = folder(args.out.as_deref(), &path, "inspect")?;
    Report { title, finding, about, heads, columns, more, body: String::new() }.write(&out, "copying")
}

/// Logits that are there at a time (64 MiB), of each of five runs; chosen by us.
const LOGITS: usize = 1 << 24;

/// Two texts or more as CSPA reads them: as many tokens of each, and no more than fit.
fn texts(rows: &[Batch], vocab: usize) -> Vec<Vec<u32>> {
    let most = (LOGITS / vocab.max(1)).max(4);
    let seq = rows.iter().map(|row| row.seq).min().unwrap_or_default().min(most / 2);
    rows.iter().take(most / seq.max(1)).map(|row| row.tokens[..seq].to_vec()).collect()
}

/// How much of their effect on texts copy suppression explains, of the strongest heads.
fn explained(model: &Decoder, texts: &[Vec<u32>], heads: &[HeadOf], scores: &[(HeadOf, f64)]) -> Vec<Option<f64>> {
    let strongest = largest(scores, STRONGEST);
    let of = |head: &HeadOf| {
        if texts.len() < 2 || texts[0].len() < 2 || !strongest.contains(head) {
            return None;
        }
        let run = head_runs(model, texts, head.0, &[QueryHead(head.1)])?;
        Some(cspa(&run[0], texts, Keep::PUBLISHED, &[]).explained()[0]).filter(|share| share.is_finite())
    };
    heads.iter().map(of).collect()
}
