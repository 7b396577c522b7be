//! Answers to questions at several lengths and depths of a text: right or wrong, and their table as an image.

use std::fmt::Write;
use std::ops::Range;

use polyhead_attention::Mask;
use polyhead_models::intervention::Context;
use polyhead_models::{Batch, Decoder, IGNORE, Pass};

/// Parts into which texts are divided by depth.
pub const DEPTHS: usize = 5;

/// Accuracies of a task at a length.
pub struct Row {
    /// Its name.
    pub task: &'static str,
    /// Whether it is asked at several depths.
    pub has_depth: bool,
    /// Tokens.
    pub length: usize,
    /// Length in lengths of training.
    pub times: usize,
    /// Share of right answers by depth; one number where there is no depth.
    pub by_depth: Vec<f64>,
}

impl Row {
    /// Share of right answers.
    pub fn accuracy(&self) -> f64 {
        self.by_depth.iter().sum::<f64>() / self.by_depth.len() as f64
    }
}

/// Whether a model, choosing the likeliest token each time, would write the tokens at the places `answer` of a text, from the
/// first to the last. `begin` are tokens that begin every text. To an intervention, the answer is what is generated.
pub fn is_right(model: &Decoder, tokens: &[u32], answer: &Range<usize>, begin: &[u32]) -> bool {
    let tokens = [begin, &tokens[..answer.end]].concat();
    let asked = |at: usize| (at + 1).checked_sub(begin.len()).is_some_and(|at| answer.contains(&at));
    let target = |at: usize| if asked(at) { i64::from(tokens[at + 1]) } else { IGNORE };
    let seq = tokens.len();
    let targets = (0..seq).map(target).collect();
    let batch = Batch { batch: 1, seq, tokens, targets, ..Batch::default() };
    let prompt = begin.len() + answer.start;
    let context = Context { rows: 1, tokens: &batch.tokens[..prompt], prompt, ..Context::default() };
    let sums = model.evaluate_pass(&batch, Pass { context: Some(context), ..Pass::new(&Mask::causal()) });
    sums.targets > 0 && sums.correct == sums.targets
}

/// A row as a line of text.
pub fn line(row: &Row) -> String {
    let mut text = format!("{:<18} {:>3}x {:>7} tokens ", row.task, row.times, row.length);
    for accuracy in &row.by_depth {
        let _ = write!(text, " {:>4.0} %", 100.0 * accuracy);
    }
    if row.has_depth {
        let _ = write!(text, "   all {:>4.0} %", 100.0 * row.accuracy());
    }
    text
}

/// One panel a task: lengths from left to right, depths from top to bottom.
pub fn heatmap(rows: &[Row]) -> String {
    const CELL: usize = 52;
    const LEFT: usize = 70;
    const TOP: usize = 46;
    let mut tasks: Vec<&'static str> = rows.iter().map(|row| row.task).collect();
    tasks.dedup();
    let of = |task: &'static str| rows.iter().filter(move |row| row.task == task);
    let columns = tasks.iter().map(|&task| of(task).count()).max().unwrap_or(0);
    let (width, panel) = (LEFT + columns * CELL + 20, TOP + DEPTHS * 30 + 16);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        panel * tasks.len()
    );
    let mut text = |x: usize, y: usize, anchor: &str, colour: &str, words: String| {
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}</text>");
    };
    let mut cells = String::new();
    for (number, &task) in tasks.iter().enumerate() {
        let top = number * panel;
        text(LEFT, top + 18, "start", "black", format!("{}: right answers in %", task));
        for (column, row) in of(task).enumerate() {
            let x = LEFT + column * CELL;
            text(x + CELL / 2, top + 38, "middle", "black", format!("{}x", row.times));
            let height = DEPTHS * 30 / row.by_depth.len();
            for (depth, accuracy) in row.by_depth.iter().enumerate() {
                let y = top + TOP + depth * height;
                // From white to a dark blue.
                let shade = |white: f64, full: f64| (white + (full - white) * accuracy) as u8;
                let _ = writeln!(
                    cells,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"rgb({},{},{})\"/>",
                    CELL - 2,
                    height - 2,
                    shade(240.0, 20.0),
                    shade(240.0, 80.0),
                    shade(240.0, 150.0)
                );
                let colour = if *accuracy > 0.5 { "white" } else { "black" };
                let words = format!("{:.0}", 100.0 * accuracy);
                let middle = y + height / 2 + 4;
                let label = format!(
                    "<text x=\"{}\" y=\"{middle}\" text-anchor=\"middle\" fill=\"{colour}\">{words}</text>\n",
                    x + CELL / 2 - 1
                );
                cells.push_str(&label);
                if column == 0 && row.by_depth.len() > 1 {
                    let share = |depth: usize| 100 * depth / DEPTHS;
                    text(LEFT - 6, middle, "end", "black", format!("{}-{} %", share(depth), share(depth + 1)));
                }
            }
        }
    }
    svg + &cells + "</svg>\n"
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;
    use std::ops::ControlFlow;

    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::intervention::{Intervention, InterventionConfig};
    use polyhead_models::weights::{load, named};
    use polyhead_models::{DecoderConfig, Past, Sampling};

    use super::*;

    #[test]
    fn an_answer_is_what_a_model_writes_under_edits_of_what_it_generates() {
        let config = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 2}}}"#;
        seed_random(5);
        let fresh = serde_json::from_str::<DecoderConfig>(config).unwrap().init(20, &Device::flex());
        let larger = named(&fresh).into_iter().map(|mut tensor| {
            tensor.values.iter_mut().for_each(|value| *value *= 5.0);
            (tensor.name.clone(), tensor)
        });
        let larger = larger.collect();
        let plain = load(fresh, larger).unwrap();
        let edits = r#"{"edits": [{"site": "z", "phase": "decode", "change": {"scale": -3}}]}"#;
        let edits: InterventionConfig = serde_json::from_str(edits).unwrap();
        let edited = plain.clone().intervened(Some(Intervention::new(&edits, &BTreeMap::new(), &plain, None).unwrap()));
        let greedy = Sampling { max_new_tokens: 4, temperature: 0.0, ..Sampling::default() };
        let mut differ = 0;
        for first in 0..8 {
            let prompt = [first, 3, 19 - first];
            let written = |model: &Decoder| {
                let mut tokens = prompt.to_vec();
                let mut past = Past::new(model);
                past.generate(model, &prompt, &greedy, &[], |token| {
                    tokens.push(token);
                    ControlFlow::Continue(())
                });
                tokens
            };
            let (of_plain, of_edited) = (written(&plain), written(&edited));
            for (model, text) in [(&plain, &of_plain), (&edited, &of_edited)] {
                assert!(is_right(model, text, &(3..7), &[]), "{prompt:?}");
                assert!(is_right(model, &text[1..], &(2..6), &text[..1]), "{prompt:?}, begun by a token");
            }
            differ += usize::from(of_plain != of_edited && !is_right(&edited, &of_plain, &(3..7), &[]));
        }
        assert!(differ > 0, "the edit changes what is written");
    }

    #[test]
    fn the_image_has_a_cell_for_every_number() {
        let row = |task, times, by_depth: Vec<f64>| Row {
            task,
            has_depth: by_depth.len() > 1,
            length: 10 * times,
            times,
            by_depth,
        };
        let rows = [
            row("needles_multi", 1, vec![1.0, 0.5, 0.0, 0.25, 0.75]),
            row("needles_multi", 2, vec![0.0; 5]),
            row("common_words", 1, vec![0.3]),
        ];
        let svg = heatmap(&rows);
        assert_eq!(svg.matches("<rect ").count(), 1 + 11);
        for words in [">needles_multi: ", ">common_words: ", ">20-40 %<", ">75<", ">2x<"] {
            assert!(svg.contains(words), "{words}");
        }
        assert!(line(&rows[0]).contains("100 %   50 %    0 %   25 %   75 %   all   50 %"), "{}", line(&rows[0]));
    }
}
