//! `polyhead heads decisions`: the tokens inside of prompts that a model was unsure of, and the heads that decide them (after arXiv
//! 2509.25758's sub-steps; how it finds and validates them is as here, its code is not published).

use clap::Args;
use polyhead_attention::{Positions, QueryHead};
use polyhead_evaluation::ablation::all_heads;
use polyhead_evaluation::head_sets::{HeadOf, largest, random};
use polyhead_evaluation::likelihood::likelihoods;
use polyhead_evaluation::patching::{Runs, groups};
use polyhead_experiments::page::table;
use polyhead_models::{Decoder, PromptPair};
use polyhead_runs::Failure;
use polyhead_training::run_folder::atomic_write;
use serde_json::json;

use super::patch::{Patched, TOKENS, key, run_groups};
use super::resume_log::ResumeLog;
use super::{OnPairs, Opened, mean, named};
use crate::console::talk;
use crate::head_report::{Report, number};
use crate::probe::word;

/// Sets of random heads that a knock-out is compared with; chosen by us.
const DRAWS: u64 = 5;

/// What counts as a decision.
#[derive(Debug, Args)]
pub struct DecisionsArgs {
    #[command(flatten)]
    on: OnPairs,
    /// A token is decided where its probability is below this.
    #[arg(long, default_value_t = 0.8, value_parser = share)]
    threshold: f64,
    /// Decisions of a prompt at most, the least probable ones.
    #[arg(long, default_value_t = 4, value_parser = crate::cli::at_least_one)]
    most: usize,
    /// The share of heads that are switched off together, one at least.
    #[arg(long, default_value_t = 0.03, value_parser = share)]
    share: f64,
}

/// Reads a share.
pub fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        Ok(share) => Err(format!("{share} must be above 0 and at most 1")),
        Err(error) => Err(error.to_string()),
    }
}

/// How many heads a share is.
pub fn count_of(share: f64, heads: usize) -> usize {
    ((share * heads as f64).round() as usize).clamp(1, heads.max(1))
}

/// A token that was decided.
struct Decision {
    /// Which pair, from 1.
    pair: usize,
    position: usize,
    probability: f64,
    /// The prompts up to there.
    prompts: PromptPair,
}

/// Finds decisions, patches them, and switches off the largest heads.
pub fn decisions(args: &DecisionsArgs) -> Result<(), Failure> {
    let Opened { trained, pairs, out } = args.on.open()?;
    let model = &trained.model;
    let found = find(model, &pairs, args);
    if found.is_empty() {
        return Err(Failure::Run(format!(
            "no token of the clean prompts behind the first that differs is less probable than {}: raise --threshold, or give longer \
             prompts",
            args.threshold
        )));
    }
    let decided: Vec<PromptPair> = found.iter().map(|decision| decision.prompts.clone()).collect();
    let line = |pair: &PromptPair| {
        let PromptPair { clean, corrupt, right, wrong } = pair;
        format!("{}\n", json!({ "clean": clean, "corrupt": corrupt, "right": right, "wrong": wrong }))
    };
    atomic_write(&out.join("decisions.jsonl"), decided.iter().map(line).collect::<String>().as_bytes())?;
    talk!("{} decisions in {} pairs", found.len(), pairs.len());

    let groups = groups(&decided, TOKENS);
    let heads = all_heads(model);
    let mut patched = Patched::new(&heads);
    let mut log = ResumeLog::open(&out, "decisions.log.jsonl", &key(model, &decided, "decisions"))?;
    let one = |runs: &Runs, (layer, head): HeadOf| Ok(runs.patch_head(layer, QueryHead(head), runs.last()));
    run_groups(model, &groups, &mut patched, &mut log, &one)?;
    let effects = patched.effects()?;
    let [clean, corrupt] = patched.ends()?;

    let count = count_of(args.share, heads.len());
    let scores: Vec<(HeadOf, f64)> =
        heads.iter().zip(&effects).map(|(&head, effect)| (head, effect.unwrap_or_default().abs())).collect();
    let chosen: Vec<HeadOf> = largest(&scores, count).into_iter().collect();
    let without = |heads: &[HeadOf]| {
        let of = |group: &Vec<PromptPair>| {
            let runs = Runs::new(model, group);
            let last: Positions = runs.last();
            runs.knock_out(heads, &last)
        };
        mean(&groups.iter().flat_map(of).collect::<Vec<_>>())
    };
    let off = without(&chosen);
    let controls: Vec<f64> =
        (0..DRAWS).map(|seed| without(&random(&heads, count, seed).into_iter().collect::<Vec<_>>())).collect();
    let control = mean(&controls);

    let text = |id: u32| word(&trained, id);
    let row = |decision: &Decision| {
        let Decision { pair, position, probability, prompts } = decision;
        vec![
            pair.to_string(),
            position.to_string(),
            text(prompts.right),
            text(prompts.wrong),
            number(Some(*probability)),
        ]
    };
    let head = ["pair", "behind position", "token", "instead", "probability"].map(String::from);
    let body = format!("<h2>Decisions</h2>\n{}", table(&head, found.iter().take(60).map(row).collect()));
    let list: Vec<String> = chosen.iter().map(|&head| named(head)).collect();
    let finding = format!(
        "Of {} heads, {} ({}) decide most: switched off at the decisions, the difference of logits falls from {clean:.3} to {off:.3}; \
         without as many random heads it is {control:.3}.",
        heads.len(),
        chosen.len(),
        list.join(", ")
    );
    let about = format!(
        "effect: what patching the head from the corrupt prompt moves at the decisions, 0 as after clean ({clean:.3}), 1 as after corrupt \
         ({corrupt:.3}). A decision is a token of a clean prompt, behind the first one that differs from the corrupt prompt, with a \
         probability below {}; it is compared with the token of the corrupt prompt, or where that is the same, with the likeliest other.",
        args.threshold
    );
    let more = json!({ "checkpoint": trained.path, "decisions": found.len(), "difference_clean": clean, "difference_corrupt": corrupt,
        "knock_out": { "heads": list, "difference": off, "random_heads": control, "random_draws": controls } });
    let more = more.as_object().cloned().unwrap_or_default();
    let title = format!("Decisions: {}", trained.path.display());
    Report { title, finding, about, heads, columns: vec![("effect", effects)], more, body }.write(&out, "decisions")
}

/// The decisions of all pairs: tokens behind the first difference of both prompts that the model was unsure of.
fn find(model: &Decoder, pairs: &[PromptPair], args: &DecisionsArgs) -> Vec<Decision> {
    let texts: Vec<Vec<u32>> = pairs.iter().map(|pair| [&pair.clean[..], &[pair.right]].concat()).collect();
    let told = likelihoods(model, &texts, 2, &|| true).unwrap_or_default();
    let mut found = Vec::new();
    for (at, ((pair, text), told)) in pairs.iter().zip(&texts).zip(&told).enumerate() {
        let first =
            pair.clean.iter().zip(&pair.corrupt).position(|(clean, corrupt)| clean != corrupt).unwrap_or(text.len());
        let decide = |position: usize| {
            let likelihood = &told[position];
            let probability = f64::from(likelihood.log_probability).exp();
            let right = text[position + 1];
            let other = pair.corrupt.get(position + 1).copied().unwrap_or(pair.wrong);
            let likeliest = likelihood.best.iter().map(|(id, _)| *id).find(|&id| id != right);
            let wrong = if other == right { likeliest? } else { other };
            let [clean, corrupt] = [&pair.clean, &pair.corrupt].map(|prompt| prompt[..=position].to_vec());
            let prompts = PromptPair { clean, corrupt, right, wrong };
            (probability < args.threshold).then_some(Decision { pair: at + 1, position, probability, prompts })
        };
        let mut own: Vec<Decision> = (first..pair.clean.len()).filter_map(decide).collect();
        own.sort_by(|a, b| a.probability.total_cmp(&b.probability));
        own.truncate(args.most);
        found.extend(own);
    }
    found
}
