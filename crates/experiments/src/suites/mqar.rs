//! Multi-query associative recall under Zoology's settings (Arora et al. 2023, arXiv 2312.04927, figure 2;
//! HazyResearch/zoology@d88d6f5): two layers of attention without feed-forward layers, learned positions, four learning rates.

use super::{Point, Score, Suite, log_spaced, watched};

pub(super) const ZOOLOGY: Suite = Suite {
    name: "mqar-zoology-v1",
    about: "the value of each key that was shown before, at 64 to 512 tokens and widths 64 to 512",
    paper: "Arora et al. 2023, Zoology, arXiv 2312.04927, figure 2",
    differs: &[ATTENTION_DROPOUT],
    points: || {
        let sizes = [(64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128)];
        let rates = log_spaced(-4.0, -2.0, 4);
        let rows = Rows { train: 100_000, test: 3000, epochs: 64 };
        grid(&sizes, &[64, 128, 256, 512], &rates, rows)
    },
    questions: None,
};

pub(super) const ZOOLOGY_SMALL: Suite = Suite {
    name: "mqar-zoology-v1-small",
    about: "mqar-zoology-v1 at 64 and 128 tokens, width 64, with batches of 64 rows, 8 epochs and two learning rates",
    paper: "after Arora et al. 2023, Zoology, arXiv 2312.04927, figure 2",
    differs: &[ATTENTION_DROPOUT, "sizes: 1000 rows to test on, batches of 64 rows, 8 epochs"],
    points: || {
        // All rows: of a fifth of them softmax learns the rows, and not to look up. Small batches reach the change in fewer rows.
        let rows = Rows { train: 100_000, test: 1000, epochs: 8 };
        grid(&[(64, 4, 64), (128, 8, 64)], &[64], &[1e-3, 2.15e-3], rows)
    },
    questions: None,
};

const ATTENTION_DROPOUT: &str =
    "dropout: on the embedding as published; none on attention weights, where 0.1 was published";

/// How many rows there are, and how often they are learned from.
#[derive(Clone, Copy)]
struct Rows {
    train: u64,
    test: u64,
    epochs: u64,
}

/// A point for each length with its pairs and its batch size, each width and each learning rate.
fn grid(sizes: &[(u64, u64, u64)], widths: &[u64], rates: &[f64], rows: Rows) -> Vec<Point> {
    let mut points = Vec::new();
    for &(seq_len, n_pairs, batch) in sizes {
        for &width in widths {
            for &lr in rates {
                points.push(Point {
                    task: format!("{seq_len} tokens, {n_pairs} pairs"),
                    setting: String::new(),
                    size: format!("width {width}"),
                    cell: format!("lr {lr:.2e}"),
                    score: Score::RowAccuracy,
                    recipe: recipe([seq_len, n_pairs, batch, width], lr, rows),
                });
            }
        }
    }
    points
}

fn recipe([seq_len, n_pairs, batch, width]: [u64; 4], lr: f64, rows: Rows) -> String {
    let Rows { train, test, epochs } = rows;
    let per_epoch = train.div_ceil(batch);
    format!(
        "\
[model.decoder]
d_model = {width}
n_layers = 2
norm = \"layer\"
norm_eps = 1e-5
mlp = \"identity\"
rope = false
learned_positions = {seq_len}
attention.softmax = {{ n_heads = 1, qkv_bias = true, o_bias = true }}

[data.mqar]
vocab_size = 8192
train = [{{ seq_len = {seq_len}, n_pairs = {n_pairs}, rows = {train} }}]
test = [{{ seq_len = {seq_len}, n_pairs = {n_pairs}, rows = {test} }}]

[training]
steps = {steps}
seq_len = {seq_len}
batch_size = {batch}
max_norm = 0
embedding_dropout = 0.1

[optimizer.adamw]
lr = {lr:e}
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.1
decay_vectors = true

[lr_scheduler]
decay = \"cosine\"
min_lr_ratio = 0
hold_steps = {per_epoch}

{rest}",
        steps = per_epoch * epochs,
        rest = watched(per_epoch, (per_epoch / 4).max(1), Some(0.99)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_suite_has_all_rows_of_the_published_one_and_smaller_batches() {
        let [small, published] = [ZOOLOGY_SMALL, ZOOLOGY].map(|suite| (suite.points)());
        let of_train = "train = [{ seq_len = 64, n_pairs = 4, rows = 100000 }]";
        for (points, batch, steps) in [(&small, 64, 8 * 1563), (&published, 512, 64 * 196)] {
            let recipe = &points[0].recipe;
            for line in
                [of_train, &format!("batch_size = {batch}"), &format!("steps = {steps}"), "stop_accuracy = 0.99"]
            {
                assert!(recipe.lines().any(|found| found == line), "{line} in {recipe}");
            }
        }
        let names: Vec<String> = small.iter().map(Point::name).collect();
        let of_64 = ["64 tokens, 4 pairs, width 64, lr 1.00e-3", "64 tokens, 4 pairs, width 64, lr 2.15e-3"];
        let of_128 = ["128 tokens, 8 pairs, width 64, lr 1.00e-3", "128 tokens, 8 pairs, width 64, lr 2.15e-3"];
        assert_eq!(names, [of_64, of_128].concat());
        assert_eq!(published.len(), 4 * 4 * 4);
    }
}
