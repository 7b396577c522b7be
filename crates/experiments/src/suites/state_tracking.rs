//! State tracking: parity and arithmetic by NX-AI and Grazzi et al. 2024 (arXiv 2411.12537), words of groups beyond the length
//! trained on (DeltaProduct: Siems et al. 2025, arXiv 2502.10297) and at their own length (Merrill et al. 2024, arXiv 2404.08819),
//! bounded brackets by Hewitt et al. 2020.

use super::{Point, Score, Suite, watched};

pub(super) const STATE_TRACKING: Suite = Suite {
    name: "state-tracking-v1",
    about: "parity, arithmetic with and without brackets, words of groups, bounded brackets, beyond the length trained on",
    paper: "Grazzi et al. 2024, arXiv 2411.12537; Merrill et al. 2024, arXiv 2404.08819; Siems et al. 2025, arXiv 2502.10297; \
            Hewitt et al. 2020, EMNLP",
    differs: &[
        "precision: f32, where bf16 was published; training.precision=\"bf16\" is for GPUs",
        "models: pre-norm decoders with rotary positions; published were blocks of xLSTM around each mechanism, and for words at \
         their own length post-norm encoders under a causal mask",
        "words at their own length: without the products of two elements among the rows to train on",
        "dyck: the accuracy of closing brackets that are certain, where the share of the closing mass was published; six of the \
         eight pairs of k and m, 20,000 steps each",
        "gradients: scaled down to a norm of 1, of which the papers say nothing",
    ],
    points: || {
        let mut points = Vec::new();
        for (task, steps, decay) in
            [("parity", 20_000, 0.0), ("modular", 100_000, 0.1), ("modular_brackets", 100_000, 0.1)]
        {
            let sizes = Sizes { width: 128, heads: 4, seq_len: 255, batch: 256, steps };
            points.push(padded(task, [(3, 40), (40, 256)], decay, (8192, sizes)));
        }
        for group in ["S3", "S4", "A5", "S5"] {
            // 100 epochs of 100000 rows.
            let sizes = Sizes { width: 128, heads: 4, seq_len: 129, batch: 2048, steps: 100 * 100_000 / 2048 };
            points.push(words(group, [128, 512], Some(100_000), (100_000, sizes)));
        }
        for group in ["Z60", "A4xZ5", "A5"] {
            for k in [6, 7, 8, 9, 10, 11, 12, 20] {
                points.extend([1, 2, 3, 4].map(|layers| same_length(group, k, layers)));
            }
        }
        for (k, m, longest) in [(2, 3, 84), (8, 3, 84), (32, 3, 84), (128, 3, 84), (2, 5, 180), (8, 5, 180)] {
            // About 2e6 tokens to train on and 3e5 to test on, in batches of 10 rows.
            let sizes = Sizes { width: 128, heads: 4, seq_len: longest, batch: 10, steps: 20_000 };
            points.push(dyck([k, m, longest], (10_000, sizes)));
        }
        points
    },
    questions: None,
};

pub(super) const STATE_TRACKING_SMALL: Suite = Suite {
    name: "state-tracking-v1-small",
    about: "the tasks of state-tracking-v1 at 16 to 32 tokens, tested at twice the length, width 64",
    paper: "after Grazzi et al. 2024, arXiv 2411.12537; Merrill et al. 2024, arXiv 2404.08819; Hewitt et al. 2020, EMNLP",
    differs: &[
        "sizes: 3 to 20 to train on and 20 to 40 to test on, words of 16 and 32; 1200 steps of 64 rows, width 64",
        "dyck: the accuracy of closing brackets that are certain, where the share of the closing mass was published",
    ],
    points: || {
        let sizes = |seq_len| Sizes { width: 64, heads: 4, seq_len, batch: 64, steps: 1200 };
        let tasks = ["parity", "modular", "modular_brackets"]
            .map(|task| padded(task, [(3, 20), (20, 40)], 0.0, (1024, sizes(39))));
        let groups = ["S3", "A5"].map(|group| words(group, [16, 32], None, (1024, sizes(17))));
        tasks.into_iter().chain(groups).chain([dyck([2, 3, 32], (1024, sizes(32)))]).collect()
    },
    questions: None,
};

/// What differs between points.
#[derive(Clone, Copy)]
struct Sizes {
    width: u64,
    heads: u64,
    seq_len: u64,
    batch: u64,
    steps: u64,
}

/// A task whose rows are padded: sizes to train on, and to test on besides.
fn padded(task: &str, [train, test]: [(u64, u64); 2], decay: f64, (rows, sizes): (u64, Sizes)) -> Point {
    let set = |(min, max): (u64, u64), rows: &str| format!("{{ min = {min}, max = {max}{rows} }}");
    let counted = format!(", rows = {rows}");
    let data = format!(
        "task = \"{task}\"\ntrain = {}\ntest = [{}, {}]",
        set(train, ""),
        set(train, &counted),
        set(test, &counted)
    );
    let chance = if task == "parity" { 0.5 } else { 0.2 };
    point(task.replace('_', " "), Score::AboveChance(chance), recipe(&data, sizes, (2, 1e-3, decay)))
}

/// Words of a group: a size to train on, and a longer one to test on besides.
fn words(group: &str, [train, test]: [u64; 2], train_rows: Option<u64>, (rows, sizes): (u64, Sizes)) -> Point {
    let of_train = train_rows.map_or(String::new(), |rows| format!(", rows = {rows}"));
    let data = format!(
        "task.words.group = \"{group}\"\ntrain = {{ min = {train}, max = {train}{of_train} }}\ntest = [{{ min = {train}, max = \
         {train}, rows = {rows} }}, {{ min = {test}, max = {test}, rows = {rows} }}]"
    );
    point(format!("words of {group}"), Score::Exact, recipe(&data, sizes, (2, 1e-3, 0.0)))
}

/// Words of a group at the length that is trained on, by the number of layers: the fewest that reach 90 % are what is read.
fn same_length(group: &str, k: u64, layers: u64) -> Point {
    let sizes = Sizes { width: 512, heads: 8, seq_len: k + 1, batch: 512, steps: 500 * 800_000 / 512 };
    let set = |rows: u64| format!("{{ min = {k}, max = {k}, rows = {rows} }}");
    let data = format!("task.words.group = \"{group}\"\ntrain = {}\ntest = [{}]", set(800_000), set(200_000));
    let recipe = recipe(&data, sizes, (layers, 5e-5, 0.01));
    let recipe = recipe.replace("batches = 0\n", "batches = 0\nstop_accuracy = 0.99\n");
    let recipe = recipe.replace("n_layers", "d_ff = 2048\nmlp = \"gelu\"\nnorm = \"layer\"\nn_layers");
    let setting = format!("size {k}");
    Point {
        setting,
        size: format!("{layers} layers"),
        ..point(format!("words of {group}, same length"), Score::Exact, recipe)
    }
}

/// Brackets of k types, at most m deep: sizes to the longest to train on, and to twice that to test on besides.
fn dyck([k, m, longest]: [u64; 3], (rows, sizes): (u64, Sizes)) -> Point {
    let data = format!(
        "task.dyck = {{ k = {k}, m = {m} }}\ntrain = {{ min = 1, max = {longest} }}\ntest = [{{ min = 1, max = {longest}, rows = \
         {rows} }}, {{ min = {}, max = {}, rows = {rows} }}]",
        longest + 1,
        2 * longest
    );
    point(format!("dyck ({k}, {m})"), Score::Accuracy, recipe(&data, sizes, (2, 1e-3, 0.0)))
}

fn point(task: String, score: Score, recipe: String) -> Point {
    Point { task, setting: String::new(), size: String::new(), cell: String::new(), score, recipe }
}

fn recipe(data: &str, sizes: Sizes, (n_layers, lr, decay): (u64, f64, f64)) -> String {
    let Sizes { width, heads, seq_len, batch, steps } = sizes;
    format!(
        "\
[model.decoder]
d_model = {width}
n_layers = {n_layers}
attention.softmax = {{ n_heads = {heads} }}

[data.state_tracking]
{data}

[training]
steps = {steps}
seq_len = {seq_len}
batch_size = {batch}

[optimizer.adamw]
lr = {lr:e}
weight_decay = {decay:?}

[lr_scheduler]
decay = \"cosine\"
warmup_steps = {warmup}
min_lr_ratio = 1e-3

{rest}",
        warmup = steps / 10,
        rest = watched(steps.div_ceil(10), steps.div_ceil(50), None),
    )
}
