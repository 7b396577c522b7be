//! Interventions that are found in one prompt with a passage: what they are found in, and what they do to an answer.

use std::ops::Range;
use std::path::PathBuf;

use clap::Args;
use polyhead_data::Tokenizer;
use polyhead_models::intervention::answer_score::answer_score;
use polyhead_models::intervention::{Intervention, InterventionConfig, Span, TextSpan};
use polyhead_models::{Batch, IGNORE};
use polyhead_recipe::Problems;
use polyhead_runs::intervention::{decode, write};
use polyhead_runs::{Failure, Trained};
use serde_json::{Value, json};

use super::{about, plain};
use crate::commands::template_pairs::joined;
use crate::console::{put, talk};

/// How often the same is measured elsewhere; chosen by us.
const MOVES: usize = 5;

/// A prompt with a passage.
#[derive(Debug, Args)]
pub struct OnPrompt {
    /// A checkpoint or a run folder.
    checkpoint: PathBuf,
    /// The prompt.
    #[arg(long, value_parser = crate::cli::typed_text)]
    prompt: String,
    /// The passage of it, to the letter.
    #[arg(long)]
    passage: String,
    /// An answer to the prompt: its loss is measured without and with the intervention, and with the same moved elsewhere (other
    /// tokens of the passage and of the rest, other heads).
    #[arg(long)]
    answer: Option<String>,
    /// The intervention to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    device: Option<String>,
}

/// What [`OnPrompt`] names.
pub struct Opened {
    /// The model.
    pub trained: Trained,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// The places of the passage.
    pub passage: Range<usize>,
    answer: Option<Batch>,
}

impl OnPrompt {
    /// Opens the model, and finds the passage.
    pub fn open(&self) -> Result<Opened, Failure> {
        let trained = plain(&self.checkpoint, self.device.as_deref(), &self.out)?;
        let tokenizer = trained.text_tokenizer()?;
        let tokens = tokenizer.encode_prompt(&self.prompt)?;
        let passage = part(tokenizer, &tokens, "--passage", &self.passage)?;
        let answer = self.answer.as_ref().map(|answer| -> Result<Batch, Failure> {
            let (whole, first) = joined(tokenizer, &self.prompt, answer)?;
            if first >= whole.len() || first < passage.end {
                let problem = "--answer must be some text behind the prompt, which ends behind the passage";
                return Err(Problems::plain(problem.into()).into());
            }
            let mut batch = Batch::text(whole);
            // A token is the target of the one before it.
            batch.targets[..first - 1].fill(IGNORE);
            Ok(batch)
        });
        Ok(Opened { answer: answer.transpose()?, trained, tokens, passage })
    }

    /// Writes an intervention, and tells what it does to the answer beside the same moved elsewhere, by so many places.
    pub fn write(
        &self,
        opened: &Opened,
        moved: &dyn Fn(usize) -> InterventionConfig,
        mut result: Value,
    ) -> Result<(), Failure> {
        let trained = &opened.trained;
        if let Some(answer) = &opened.answer {
            let batches = std::slice::from_ref(answer);
            let under = |config: &InterventionConfig| {
                let intervention = Intervention::new(config, &Default::default(), &trained.model, None);
                let intervention = intervention.map_err(|error| about(trained, &error))?;
                let model = trained.model.clone().intervened(Some(intervention));
                Ok(answer_score(&model, batches, &|_| Vec::new()).loss)
            };
            let before = answer_score(&trained.model, batches, &|_| Vec::new()).loss;
            let after = under(&moved(0))?;
            let elsewhere = (1..=MOVES).map(|by| under(&moved(by))).collect::<Result<Vec<f64>, Failure>>()?;
            let elsewhere = elsewhere.iter().sum::<f64>() / MOVES as f64;
            talk!(
                "answer, nats a token: {before:.4} without, {after:.4} with it, {elsewhere:.4} with the same elsewhere"
            );
            result["answer"] = json!({ "plain": before, "tuned": after, "elsewhere": elsewhere });
        }
        write(&self.out, moved(0), &[])?;
        talk!("wrote {}", self.out.display());
        result["checkpoint"] = json!(trained.path);
        put!("{result:#}")
    }
}

/// The places of a part of a prompt, which is there once.
pub fn part(tokenizer: &Tokenizer, tokens: &[u32], option: &str, text: &str) -> Result<Range<usize>, Failure> {
    let inside = Span::Text(TextSpan { text: text.into() }).of_text(tokens, &decode(tokenizer));
    let places: Vec<usize> = (0..tokens.len()).filter(|&at| inside[at]).collect();
    let refuse = |problem: String| Err(Problems::plain(problem).into());
    let (Some(&first), Some(&last)) = (places.first(), places.last()) else {
        return refuse(format!("{option} ({text:?}) is nowhere in the prompt: it is searched to the letter"));
    };
    if places.len() != last + 1 - first || places.len() == tokens.len() {
        return refuse(format!("{option} must be in the prompt once, and be a part of it"));
    }
    Ok(first..last + 1)
}
