//! `polyhead eval --task template_pairs`: what a model prefers where a template has one attribute rather than the other.

use polyhead_data::{Tokenizer, read_templates};
use polyhead_evaluation::likelihood::{Likelihood, likelihoods};
use polyhead_evaluation::templates::{MeanInterval, OptionScore, difference};
use polyhead_models::Batch;
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::open_trained;
use serde_json::{Value, json};

use crate::allowed::caller;
use crate::cli::EvalArgs;
use crate::console::{put, talk};
use crate::probe::check_rows;

/// Prints the mean difference of preferences over the templates of a file with its interval, as JSON.
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let Some(file) = &args.file else {
        let words = "--task template_pairs takes a file of templates: polyhead eval MODEL --task template_pairs FILE";
        return Err(Problems::plain(words.into()).into());
    };
    for (name, given) in [
        ("--lengths", !args.lengths.is_empty()),
        ("--unit", args.unit.is_some()),
        ("--heatmap", args.heatmap.is_some()),
        ("--prompts", args.prompts.is_some()),
    ] {
        if given {
            return Err(
                Problems::plain(format!("{name} says nothing about --task template_pairs: leave it out")).into()
            );
        }
    }
    let templates = read_templates(&[file.display().to_string()])?;
    templates.notes.iter().for_each(|note| talk!("note: {note}"));
    let templates = templates.items;
    if templates.len() < 2 {
        let problem = format!("{}: {} template: an interval takes two at least", file.display(), templates.len());
        return Err(Failure::Run(problem));
    }
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), caller())?;
    let trained = trained.intervened(args.intervention.as_deref())?;
    let tokenizer = trained.text_tokenizer()?;
    let mut texts = Vec::new();
    for template in &templates {
        for prompt in &template.prompts {
            for option in &template.options {
                texts.push(joined(tokenizer, prompt, option)?);
            }
        }
    }
    let tokens: Vec<Vec<u32>> = texts.iter().map(|(tokens, _)| tokens.clone()).collect();
    check_rows(&trained, "prompts", &tokens.iter().cloned().map(Batch::text).collect::<Vec<_>>())?;
    let found = likelihoods(&trained.model, &tokens, 0, &|| true).unwrap_or_default();
    let scores: Vec<OptionScore> = found.iter().zip(&texts).map(|(of, (_, first))| score(of, *first)).collect();
    let differences = |per_token: bool| -> Vec<f64> {
        let (templates, _) = scores.as_chunks::<4>();
        templates.iter().map(|&[a, b, c, d]| difference(&[[a, b], [c, d]], per_token)).collect()
    };
    let summary = |values: &[f64]| -> Value {
        let told = MeanInterval::of(values, args.seed).map(|MeanInterval { mean, interval }| (mean, interval));
        let above = values.iter().filter(|value| **value > 0.0).count();
        json!({ "mean": told.map(|told| told.0), "interval": told.map(|told| told.1), "above_0": above })
    };
    let [sums, means] = [false, true].map(differences);
    let rows: Vec<Value> =
        templates.iter().zip(&sums).map(|(one, sum)| json!({ "row": one.name, "nats": sum })).collect();
    let result = json!({
        "checkpoint": trained.path, "templates": templates.len(), "seed": args.seed, "nats": summary(&sums),
        "nats_per_token": summary(&means), "rows": rows,
    });
    put!("{result:#}")
}

/// The tokens of an option behind a text, and the place of its first. Spaces between both belong to the option, as they do to words.
pub fn joined(tokenizer: &Tokenizer, prompt: &str, option: &str) -> Result<(Vec<u32>, usize), Failure> {
    let (text, whole) =
        (tokenizer.encode_prompt(prompt.trim_end())?, tokenizer.encode_prompt(&format!("{prompt}{option}"))?);
    let same = text.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    Ok((whole, same))
}

/// Of the likelihoods of all tokens but the first, those from a place on.
fn score(of: &[Likelihood], first: usize) -> OptionScore {
    let own = &of[first.saturating_sub(1)..];
    OptionScore { log_probability: own.iter().map(|one| f64::from(one.log_probability)).sum(), tokens: own.len() }
}
