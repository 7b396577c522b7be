//! `polyhead inspect --lens`: what makes the logit of a token, by the layers that it is read behind and by the parts that add up to it.

use polyhead_evaluation::head_sets::HeadOf;
use polyhead_evaluation::lens::{DirectLogits, Lens, Targets, direct_logits, token_lens};
use polyhead_experiments::page::table;
use polyhead_kernels::comparison::largest;
use polyhead_models::{Batch, IGNORE};
use polyhead_recipe::Problems;
use polyhead_runs::{Failure, Trained};
use serde_json::{Value, json};

use super::InspectArgs;
use crate::console::{progress, put, wants_json};
use crate::head_report::{Report, most, number};
use crate::heads::named;
use crate::probe::{choose, folder, probe, word};

/// A text up to where a token is predicted, and what makes its logit.
struct Read {
    tokens: Vec<u32>,
    token: u32,
    lens: Vec<Lens>,
    parts: DirectLogits,
}

impl Read {
    /// The logit that the parts add up to: less that of --instead, where there is one.
    fn logit(&self, minus: &[Lens]) -> f64 {
        let last = |lens: &[Lens]| lens.last().map_or(0.0, |end| end.logit);
        last(&self.lens) - last(minus)
    }
}

/// Writes the tables.
pub fn inspect(args: &InspectArgs, trained: &Trained) -> Result<(), Failure> {
    let rows = probe(trained, &args.text, args.rows)?;
    // Rows are read as texts, of which nobody says whose a token is.
    trained.check_roles(false)?;
    let model = &trained.model;
    let id = |option: &str, text: &Option<String>| text.as_ref().map(|text| token(trained, option, text)).transpose();
    let (answer, instead) = (id("--answer", &args.answer)?, id("--instead", &args.instead)?);
    let mut texts: Vec<Read> = Vec::new();
    let mut apart: Vec<f64> = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        let Some((tokens, next)) = cut(row, !args.text.is_empty()) else { continue };
        let likeliest = || token_lens(model, &tokens, 0).last().map_or(0, |end| end.first);
        let token = answer.or(next).unwrap_or_else(likeliest);
        let (of, minus) = ([token], instead.map(|other| [other]));
        let targets =
            Targets { rows: std::slice::from_ref(&tokens), tokens: &of, minus: minus.as_ref().map(|other| &other[..]) };
        let (lens, parts) = (token_lens(model, &tokens, token), direct_logits(model, targets));
        let other = instead.map(|other| token_lens(model, &tokens, other)).unwrap_or_default();
        let read = Read { tokens, token, lens, parts };
        apart.push((read.parts.total()[0] - read.logit(&other)).abs());
        texts.push(read);
        progress("reading logits", at as u64 + 1, rows.len() as u64);
    }
    if texts.is_empty() {
        return Err(Problems::plain("no row has anything to predict: more of them (--rows), or a --text".into()).into());
    }
    write(args, trained, &texts, (instead, largest(0.0, apart)))
}

/// A text as it is; of a row of data, its last text up to the last target, and this.
fn cut(row: &Batch, is_text: bool) -> Option<(Vec<u32>, Option<u32>)> {
    if is_text {
        return Some((row.tokens.clone(), None));
    }
    let last = row.targets.iter().rposition(|&target| target != IGNORE)?;
    let other = |ids: &Vec<u32>| ids[..last].iter().rposition(|&id| id != ids[last]);
    let first = row.documents.as_ref().and_then(other).map_or(0, |other| other + 1);
    Some((row.tokens[first..=last].to_vec(), u32::try_from(row.targets[last]).ok()))
}

/// The token of an option: the first of a text, or an id.
fn token(trained: &Trained, option: &str, text: &str) -> Result<u32, Failure> {
    let refused = |problem: String| Failure::from(Problems::plain(format!("{option} ({text:?}) {problem}")));
    let vocab = trained.model.vocab_size();
    match &trained.tokenizer {
        Some(tokenizer) => {
            let first = tokenizer.encode(text)?.first().copied();
            first.ok_or_else(|| refused("is no token long: give a longer text".into()))
        }
        None => {
            let id = text.parse::<u32>().ok().filter(|&id| (id as usize) < vocab);
            id.ok_or_else(|| {
                refused(format!("must be the id of a token, 0 to {}: the model has no tokenizer", vocab - 1))
            })
        }
    }
}

/// The mean over texts of a number of each.
fn mean(texts: &[Read], of: impl Fn(&Read) -> f64) -> f64 {
    texts.iter().map(of).sum::<f64>() / texts.len() as f64
}

/// What a token is called, between quotes where it is a text.
fn quoted(trained: &Trained, id: u32) -> String {
    let word = word(trained, id);
    if trained.tokenizer.is_some() { format!("{word:?}") } else { word }
}

const POINTS: [&str; 5] = ["point", "logit", "probability", "rank", "likeliest"];

/// A row for each point of the residual stream: means over texts, and the likeliest token of the first.
fn points(trained: &Trained, texts: &[Read]) -> Vec<Vec<String>> {
    let row = |at: usize| {
        let of = |value: fn(&Lens) -> f64| number(Some(mean(texts, |text| value(&text.lens[at]))));
        let Lens { point, first, .. } = &texts[0].lens[at];
        let [logit, probability] = [|own: &Lens| own.logit, |own: &Lens| own.probability].map(of);
        let rank = mean(texts, |text| text.lens[at].rank as f64);
        // Of several texts it is a mean.
        let rank = if texts.len() == 1 { format!("{rank:.0}") } else { format!("{rank:.1}") };
        vec![point.clone(), logit, probability, rank, quoted(trained, *first)]
    };
    (0..texts[0].lens.len()).map(row).collect()
}

/// The mean part of a head.
fn of_head(texts: &[Read], (layer, head): HeadOf) -> f64 {
    mean(texts, |text| f64::from(text.parts.heads[layer][head][0]))
}

/// Every part with its mean, those of heads together; at the end their sum.
fn parts(texts: &[Read]) -> Vec<(String, f64)> {
    let mut parts = vec![("embedding".to_owned(), mean(texts, |text| f64::from(text.parts.embedding[0])))];
    for (layer, heads) in texts[0].parts.heads.iter().enumerate() {
        let heads = (0..heads.len()).map(|head| of_head(texts, (layer, head))).sum();
        parts.push((format!("{layer} heads"), heads));
        parts.push((format!("{layer} attention bias"), mean(texts, |text| text.parts.beside_heads(layer)[0])));
        parts.push((format!("{layer} feed-forward"), mean(texts, |text| f64::from(text.parts.mlp[layer][0]))));
    }
    parts.push(("bias".to_owned(), mean(texts, |text| f64::from(text.parts.bias[0]))));
    parts.push(("sum".to_owned(), mean(texts, |text| text.parts.total()[0])));
    parts
}

/// A text as JSON.
fn as_json(text: &Read) -> Value {
    let Read { tokens, token, lens, parts } = text;
    let heads: Vec<Vec<f32>> = parts.heads.iter().map(|layer| layer.iter().map(|head| head[0]).collect()).collect();
    let each = |layers: &[Vec<f32>]| layers.iter().map(|layer| layer[0]).collect::<Vec<f32>>();
    json!({ "length": tokens.len(), "token": token, "lens": lens, "embedding": parts.embedding[0], "heads": heads,
        "attention": each(&parts.attention), "mlp": each(&parts.mlp), "bias": parts.bias[0], "sum": parts.total()[0] })
}

const ABOUT: &str = "Logit lens (nostalgebraist 2020): the last norm and the output projection on the residual stream before, inside \
    of and behind layers; logit, probability and rank are those of the token, means over texts, and the likeliest is that of the first \
    text. Parts (Elhage et al. 2021): what the embedding, each head and each feed-forward layer add to the logit directly, with the \
    scale of the last norm as it is; attention bias is that of an output projection, bias that of the last norm and of the logits.";

/// Prints the tables, and writes the page and the JSON; `worst` is how far the parts are from a logit at most.
fn write(
    args: &InspectArgs,
    trained: &Trained,
    texts: &[Read],
    (instead, worst): (Option<u32>, f64),
) -> Result<(), Failure> {
    let (points, parts) = (points(trained, texts), parts(texts));
    let rows: Vec<Vec<String>> = parts.iter().map(|(name, value)| vec![name.clone(), number(Some(*value))]).collect();
    let mut heads: Vec<HeadOf> = Vec::new();
    for layer in choose("--layers", &args.layers, trained.model.layers.len())? {
        let chosen = choose("--heads", &args.heads, texts[0].parts.heads[layer].len())?;
        heads.extend(chosen.into_iter().map(|head| (layer, head)));
    }
    let logits: Vec<Option<f64>> = heads.iter().map(|&head| Some(of_head(texts, head))).collect();
    let of = match texts {
        [text] => quoted(trained, text.token),
        _ => format!("the next token of {} texts, mean", texts.len()),
    };
    let less = instead.map_or(String::new(), |other| format!(", less that of {}", quoted(trained, other)));
    let strongest = most(&heads, &logits).map_or_else(String::new, |(head, logit)| {
        format!(" Of the heads {} does most, {}.", named(head), number(Some(logit)))
    });
    let sum = number(parts.last().map(|(_, sum)| *sum));
    let finding = format!("Logit of {of}{less}: {sum}; the parts miss it by {worst:.0e} at most.{strongest}");
    if !wants_json() {
        let line =
            |cells: &[String]| put!("{:>12} {:>12} {:>12} {:>8}  {}", cells[0], cells[1], cells[2], cells[3], cells[4]);
        line(&POINTS.map(String::from))?;
        points.iter().try_for_each(|row| line(row))?;
        put!("\n{:>24} {:>12}", "part", "logit")?;
        rows.iter().try_for_each(|row| put!("{:>24} {:>12}", row[0], row[1]))?;
        put!("")?;
    }
    let [lens, by_part] = [table(&POINTS.map(String::from), points), table(&["part", "logit"].map(String::from), rows)];
    let more = json!({ "checkpoint": trained.path, "instead": instead, "largest_difference": worst,
        "parts": parts.iter().map(|(part, logit)| json!({ "part": part, "logit": logit })).collect::<Vec<_>>(),
        "texts": texts.iter().map(as_json).collect::<Vec<_>>() });
    let report = Report {
        title: format!("Logits of {}", trained.path.display()),
        finding,
        about: ABOUT.into(),
        heads,
        columns: vec![("logit", logits)],
        more: more.as_object().cloned().unwrap_or_default(),
        body: format!("<h2>Logit lens</h2>\n{lens}<h2>Parts</h2>\n{by_part}"),
    };
    report.write(&folder(args.out.as_deref(), &trained.path, "inspect")?, "lens")
}
