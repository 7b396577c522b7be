//! The loss of texts of any length: read in windows that overlap, every token predicted once.

use polyhead_models::{Batch, Decoder, Evaluated, IGNORE};

use crate::texts::padded;

/// Tokens of one forward pass, roughly; chosen by us.
const TOKENS: usize = 4096;

/// How a text is cut into what a model reads at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens that the model reads at a time, at least 1.
    pub window: usize,
    /// Tokens from one window to the next, 1 to `window`. A prediction sees at least `window - stride` tokens, where the text
    /// has so many before it; the smaller the stride, the more has to be computed.
    pub stride: usize,
}

impl Windows {
    /// The windows of a text, a batch of one row each: every token but the first is a target in exactly one of them.
    pub fn of(&self, tokens: &[u32]) -> Vec<Batch> {
        let (mut rows, mut predicted) = (Vec::new(), 1);
        for start in (0..).step_by(self.stride) {
            if predicted >= tokens.len() {
                break;
            }
            let end = tokens.len().min(start + self.window + 1);
            let mut row = Batch::text(tokens[start..end].to_vec());
            // What is read last has nothing behind it to predict.
            row.tokens.pop();
            row.targets.pop();
            row.seq -= 1;
            row.targets[..predicted - 1 - start].fill(IGNORE);
            predicted = end;
            rows.push(row);
        }
        rows
    }
}

/// The sums over all tokens of texts but the first of each. `bytes` is how many bytes of text each id stands for, for bits per
/// byte. `progress` gets the windows done and all there are. Call it on `model.valid()`.
pub fn text_loss(
    model: &Decoder,
    texts: &[Vec<u32>],
    windows: Windows,
    bytes: Option<&[u32]>,
    progress: &mut dyn FnMut(u64, u64),
) -> Evaluated {
    let mut rows: Vec<Batch> = texts.iter().flat_map(|text| windows.of(text)).collect();
    let all = rows.len() as u64;
    // Like lengths together, so that little is padded; the sums do not depend on the order of rows.
    rows.sort_by_key(|row| std::cmp::Reverse(row.seq));
    let (mut sums, mut done) = (Evaluated::default(), 0);
    for rows in rows.chunks((TOKENS / windows.window).max(1)) {
        let mut batch = padded(rows);
        let of = |&target: &i64| usize::try_from(target).ok().and_then(|id| bytes?.get(id).copied());
        batch.target_bytes = batch.targets.iter().filter_map(of).map(u64::from).sum();
        sums.add(model.evaluate(&batch));
        done += rows.len() as u64;
        progress(done, all);
    }
    sums
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;

    use super::*;

    #[test]
    fn every_token_but_the_first_is_predicted_once() {
        for length in 0..24usize {
            let text: Vec<u32> = (0..length as u32).collect();
            for window in 1..9 {
                for stride in 1..=window {
                    let mut times = vec![0; length];
                    for row in (Windows { window, stride }).of(&text) {
                        assert!(row.seq <= window && row.tokens.len() == row.seq);
                        for (at, &target) in row.targets.iter().enumerate().filter(|(_, target)| **target != IGNORE) {
                            assert_eq!(target, i64::from(row.tokens[at]) + 1);
                            // The window reaches back as far as is said, or to the beginning.
                            assert!(at + 1 > window - stride || row.tokens[0] == 0);
                            times[target as usize] += 1;
                        }
                    }
                    assert!(times.iter().skip(1).all(|&count| count == 1), "{length} {window} {stride}: {times:?}");
                }
            }
        }
    }

    #[test]
    fn sums_are_those_of_the_windows_one_by_one() {
        let config = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 2}}}"#;
        seed_random(5);
        let model = serde_json::from_str::<DecoderConfig>(config).unwrap().init(9, &Device::flex());
        let texts = [(0..40).map(|at| at * at % 9).collect::<Vec<u32>>(), vec![3, 1, 2], vec![4], vec![]];
        let windows = Windows { window: 8, stride: 3 };
        let bytes: Vec<u32> = (0..9).collect();
        let sums = text_loss(&model, &texts, windows, Some(&bytes), &mut |_, _| ());
        assert_eq!(sums.targets, 39 + 2);
        assert_eq!(sums.bytes, texts.iter().flat_map(|text| text.iter().skip(1)).map(|&id| u64::from(id)).sum::<u64>());
        let mut expected = 0.0;
        for (text, at) in texts.iter().flat_map(|text| (1..text.len()).map(move |at| (text, at))) {
            // The window that predicts position `at` starts at the first stride from which it is seen.
            let start = if at <= 8 { 0 } else { (at - 8).div_ceil(3) * 3 };
            let mut row = Batch::text(text[start..=at].to_vec());
            let last = row.seq - 2;
            row.targets[..last].fill(IGNORE);
            expected += model.evaluate(&row).loss;
        }
        assert!((sums.loss - expected).abs() < 1e-4, "{} {expected}", sums.loss);
        let all = |window| text_loss(&model, &texts, Windows { window, stride: window }, None, &mut |_, _| ());
        assert_ne!(all(8).loss, all(4).loss);
    }
}
