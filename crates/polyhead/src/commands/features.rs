//! `polyhead features`: what every layer of a decoder makes of labelled texts, or of texts that belong together.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use polyhead_data::{
    FromFiles, LabelledFields, LabelledText, NewFeatures, NewPairs, PairedText, Tokenizer, distinct_names,
    read_labelled, read_pairs,
};
use polyhead_models::TokenPooling;
use polyhead_training::run_folder::atomic_write;

use super::must_not_exist;
use super::new_folder::sweep;
use crate::allowed::caller;
use crate::console::{bytes, progress, talk};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::open_trained;

/// What goes through which model.
#[derive(Debug, Args)]
pub struct FeaturesArgs {
    /// A checkpoint, a run folder, or a folder in Hugging Face's format.
    pub checkpoint: PathBuf,
    /// JSON lines with a text and a label, or with pairs: files, folders and patterns.
    #[arg(long, required = true, num_args = 1..)]
    pub data: Vec<String>,
    /// The field that holds the text.
    #[arg(long, default_value = "text", conflicts_with = "pairs")]
    pub text_field: String,
    /// The field that holds the label: the name of a class, or its number.
    #[arg(long, default_value = "label", conflicts_with = "pairs")]
    pub label_field: String,
    /// The rows are texts that belong together, for model.embedder, instead of texts with labels.
    #[arg(long, conflicts_with = "classes")]
    pub pairs: bool,
    /// The fields of a query, of a document that belongs to it, and of one that does not; the last may be in no row.
    #[arg(
        long,
        value_delimiter = ',',
        num_args = 3,
        default_value = "query,positive,negative",
        value_names = ["QUERY", "POSITIVE", "NEGATIVE"]
    )]
    pub pair_fields: Vec<String>,
    /// The names of the classes, in the order of their numbers. Default: all labels that occur, sorted. For files that
    /// belong together, one to learn from and one to validate on.
    #[arg(long, value_delimiter = ',')]
    pub classes: Vec<String>,
    /// How the tokens of a text become one vector.
    #[arg(long, value_enum, default_value_t = Pool::Mean)]
    pub pool: Pool,
    /// Tokens of a text at most; the rest is cut off. Default: what the model was made for.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// Texts at a time.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch_size: u32,
    /// The safetensors file to write.
    #[arg(long)]
    pub out: PathBuf,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// How the tokens of a text become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pool {
    /// The mean over all of them.
    Mean,
    /// The last one, which has seen all others: that of the end of text, where the tokenizer has one, so that none stands
    /// for a text that happens to be cut there.
    Last,
}

impl Pool {
    fn of_tokens(self) -> TokenPooling {
        match self {
            Self::Mean => TokenPooling::Mean,
            Self::Last => TokenPooling::Last,
        }
    }
}

/// Runs the texts through the model and writes the file.
pub fn features(args: &FeaturesArgs) -> Result<(), Failure> {
    must_not_exist(&args.out)?;
    if let Some(folder) = args.out.parent() {
        // Now, not when all texts have been read.
        std::fs::create_dir_all(folder).map_err(|error| Failure::file("create", folder, error))?;
        sweep(folder)?;
    }
    let bytes = match args.pairs {
        true => {
            let fields = [&args.pair_fields[0], &args.pair_fields[1], &args.pair_fields[2]].map(String::as_str);
            let FromFiles { items: pairs, notes } = read_pairs(&args.data, fields)?;
            notes.iter().for_each(|note| talk!("note: {note}"));
            let parts = pairs.first().map_or(2, |pair| pair.parts.len());
            let text = |pair: PairedText| pair.parts.into_iter().map(move |part| (pair.name.clone(), part));
            let Made { values, n_layers, dim } = run(args, pairs.into_iter().flat_map(text).collect())?;
            NewPairs { values, shape: [parts, n_layers, dim] }.to_safetensors()?
        }
        false => {
            let FromFiles { items: texts, notes } = read_labelled(
                &args.data,
                LabelledFields { text: &args.text_field, label: &args.label_field, group: None },
            )?;
            notes.iter().for_each(|note| talk!("note: {note}"));
            let (labels, classes) = number(&texts, &args.classes)?;
            talk!("{} classes: {}", classes.len(), classes.iter().take(20).cloned().collect::<Vec<_>>().join(", "));
            let texts = texts.into_iter().map(|text| (text.name, text.text)).collect();
            let Made { values, n_layers, dim } = run(args, texts)?;
            NewFeatures { values, n_layers, dim, labels, classes }.to_safetensors()?
        }
    };
    atomic_write(&args.out, &bytes)?;
    talk!("wrote {}", args.out.display());
    Ok(())
}

/// What the model made of the texts.
struct Made {
    /// `[texts, layers, dim]`
    values: Vec<f32>,
    n_layers: usize,
    dim: usize,
}

/// Runs texts, each with where it comes from, through the model.
fn run(args: &FeaturesArgs, texts: Vec<(String, String)>) -> Result<Made, Failure> {
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), caller())?;
    let tokenizer = trained.text_tokenizer()?;
    let most = args.max_tokens.map_or(trained.max_positions, |most| most as usize);
    let end = tokenizer.end_of_text().filter(|_| args.pool == Pool::Last);
    let (tokens, cut) = encode(&texts, tokenizer, (most, end))?;
    if cut > 0 {
        talk!("{cut} of {} texts are longer than {most} tokens: what is beyond is cut off", texts.len());
    }
    let (n_layers, dim) = (trained.model.config().n_layers, trained.model.config().d_model);
    let size = n_layers * dim;
    let to_write = bytes(4 * (texts.len() * size) as u64);
    talk!("{} texts, {n_layers} layers x {dim} channels: {to_write} to write", texts.len());

    // Texts of like length go together, so that little is padded.
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&index| tokens[index].len());
    let mut values = vec![0.0; texts.len() * size];
    let mut done = 0;
    for chosen in order.chunks(args.batch_size as usize) {
        let batch: Vec<Vec<u32>> = chosen.iter().map(|&index| tokens[index].clone()).collect();
        let made = trained.model.layer_features(&batch, args.pool.of_tokens()).into_data();
        let made: Vec<f32> = made.iter::<f32>().collect();
        for (&index, row) in chosen.iter().zip(made.chunks(size)) {
            if row.iter().any(|value| !value.is_finite()) {
                return Err(Failure::Run(format!("{}: the model's features are not finite", texts[index].0)));
            }
            values[index * size..(index + 1) * size].copy_from_slice(row);
        }
        done += chosen.len();
        progress("reading texts", done as u64, texts.len() as u64);
    }
    Ok(Made { values, n_layers, dim })
}

/// The numbers of the labels, and the names that belong to them.
fn number(texts: &[LabelledText], named: &[String]) -> Result<(Vec<u32>, Vec<String>), Failure> {
    let classes = match named.is_empty() {
        true => distinct_names(texts.iter().map(|text| &text.label)),
        false => named.to_vec(),
    };
    let of_text = |text: &LabelledText| {
        classes.iter().position(|class| *class == text.label).map(|class| class as u32).ok_or_else(|| {
            let problem = format!("{}: --classes does not name the label \"{}\"", text.name, text.label);
            Failure::from(Problems::plain(problem))
        })
    };
    Ok((texts.iter().map(of_text).collect::<Result<_, _>>()?, classes))
}

/// The tokens of all texts, `most` of each with the `end` that is put behind it, and how many texts were cut.
fn encode(
    texts: &[(String, String)],
    tokenizer: &Tokenizer,
    (most, end): (usize, Option<u32>),
) -> Result<(Vec<Vec<u32>>, usize), Failure> {
    let room = most.saturating_sub(usize::from(end.is_some())).max(1);
    let mut cut = 0;
    let mut encode = |(name, text): &(String, String)| {
        let mut tokens = tokenizer.encode_whole(text)?;
        if tokens.is_empty() {
            return Err(Failure::Run(format!("{name}: the text is empty")));
        }
        cut += usize::from(tokens.len() > room);
        tokens.truncate(room);
        tokens.extend(end.filter(|end| tokens.len() < most && tokens.last() != Some(end)));
        Ok(tokens)
    };
    let tokens = texts.iter().map(&mut encode).collect::<Result<Vec<_>, _>>()?;
    Ok((tokens, cut))
}
