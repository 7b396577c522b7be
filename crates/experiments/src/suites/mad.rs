//! Mechanistic architecture design under its published settings (Poli et al. 2024, arXiv 2403.17844; athms/mad-lab@0f49a45): six
//! tasks, each with a baseline whose difficulty is varied in one respect at a time, and six optimiser cells for each.

use super::{Point, Score, Suite, watched};

pub(super) const MAD: Suite = Suite {
    name: "mad-v1",
    about: "recall, fuzzy and noisy recall, copying, compression, memorisation: 66 settings, 6 optimiser cells each",
    paper: "Poli et al. 2024, Mechanistic Design and Scaling of Hybrid Architectures, arXiv 2403.17844",
    differs: &[
        "precision: f32, where bf16 was published; training.precision=\"bf16\" is for GPUs",
        "weights: linear layers begin with N(0, 0.02), where PyTorch's default was published",
    ],
    points: || {
        let sizes = Sizes { width: 128, heads: 16, d_ff: 352, batch: 128, epochs: 200, test_rows: 1280 };
        let cells = [1e-4, 5e-4, 1e-3].into_iter().flat_map(|lr| [(lr, 0.0), (lr, 0.1)]);
        grid(&TASKS.map(|task| (task, true)), &cells.collect::<Vec<_>>(), sizes)
    },
    questions: None,
};

pub(super) const MAD_SMALL: Suite = Suite {
    name: "mad-v1-small",
    about: "the baselines of mad-v1's tasks with a quarter of the rows and shorter ones, width 64, one optimiser cell",
    paper: "after Poli et al. 2024, Mechanistic Design and Scaling of Hybrid Architectures, arXiv 2403.17844",
    differs: &["sizes: 3200 rows to train on and 320 to test on, of 32 to 64 tokens, 12 epochs, width 64"],
    points: || {
        let sizes = Sizes { width: 64, heads: 8, d_ff: 176, batch: 32, epochs: 12, test_rows: 320 };
        let short = |task: Task| Task { length: task.length.min(64), rows: task.rows.min(3200), copied: 8, ..task };
        grid(&TASKS.map(|task| (short(task), false)), &[(2e-3, 0.0)], sizes)
    },
    questions: None,
};

/// A task with its baseline and what its difficulty is varied by.
#[derive(Clone, Copy)]
struct Task {
    name: &'static str,
    /// Its name in `data.mad.task`.
    key: &'static str,
    vocab: u64,
    /// Ids of noise among them, and the share of pairs that are noise.
    noise: (u64, f64),
    /// The published length, which recall's rows are one shorter than.
    length: u64,
    rows: u64,
    copied: u64,
    vocabs: &'static [u64],
    lengths: &'static [u64],
    fewer_rows: &'static [u64],
    noises: &'static [f64],
    more_copied: &'static [u64],
}

const RECALL: Task = Task {
    name: "in-context recall",
    key: "in_context_recall",
    vocab: 16,
    noise: (0, 0.0),
    length: 128,
    rows: 12_800,
    copied: 16,
    vocabs: &[32, 64, 128],
    lengths: &[256, 512, 1024],
    fewer_rows: &[6400, 3200, 1600, 800],
    noises: &[],
    more_copied: &[],
};

const TASKS: [Task; 6] = [
    RECALL,
    Task { name: "fuzzy recall", key: "fuzzy_in_context_recall", ..RECALL },
    // Of noise there are 16 ids at every size of the vocabulary.
    Task {
        name: "noisy recall",
        vocab: 32,
        noise: (16, 0.2),
        vocabs: &[48, 80, 144],
        noises: &[0.4, 0.6, 0.8],
        ..RECALL
    },
    Task {
        name: "selective copying",
        key: "selective_copying",
        length: 256,
        lengths: &[512, 1024],
        more_copied: &[32, 64, 96],
        ..RECALL
    },
    Task { name: "compression", key: "compression", length: 32, lengths: &[64, 128, 256], ..RECALL },
    Task {
        name: "memorization",
        key: "memorization",
        vocab: 256,
        length: 32,
        rows: 256,
        vocabs: &[512, 1024, 2048, 4096, 8192],
        lengths: &[],
        fewer_rows: &[],
        ..RECALL
    },
];

/// What all points have in common.
#[derive(Clone, Copy)]
struct Sizes {
    width: u64,
    heads: u64,
    d_ff: u64,
    batch: u64,
    epochs: u64,
    test_rows: u64,
}

impl Task {
    /// The baseline, and each variation of it with its name.
    fn settings(self) -> Vec<(String, Self)> {
        let baseline = [("baseline".to_owned(), self)].into_iter();
        let vocabs = self.vocabs.iter().map(|&vocab| (format!("{vocab} ids"), Self { vocab, ..self }));
        let lengths = self.lengths.iter().map(|&length| (format!("{length} tokens"), Self { length, ..self }));
        let rows = self.fewer_rows.iter().map(|&rows| (format!("{rows} rows"), Self { rows, ..self }));
        let noises =
            self.noises.iter().map(|&share| (format!("noise {share}"), Self { noise: (self.noise.0, share), ..self }));
        let copied = self.more_copied.iter().map(|&copied| (format!("{copied} copied"), Self { copied, ..self }));
        baseline.chain(vocabs).chain(lengths).chain(rows).chain(noises).chain(copied).collect()
    }
}

fn grid(tasks: &[(Task, bool)], cells: &[(f64, f64)], sizes: Sizes) -> Vec<Point> {
    let mut points = Vec::new();
    for &(task, varied) in tasks {
        for (setting, settings) in task.settings().into_iter().take(if varied { usize::MAX } else { 1 }) {
            for &(lr, decay) in cells {
                points.push(Point {
                    task: task.name.into(),
                    setting: setting.clone(),
                    size: String::new(),
                    cell: format!("lr {lr:.0e}, weight decay {decay}"),
                    score: Score::MacroAccuracy,
                    recipe: recipe(settings, (lr, decay), sizes),
                });
            }
        }
    }
    points
}

fn recipe(task: Task, (lr, decay): (f64, f64), sizes: Sizes) -> String {
    let Sizes { width, heads, d_ff, batch, epochs, test_rows } = sizes;
    let Task { key, vocab, noise: (noise_ids, noise), length, rows, copied, .. } = task;
    let per_epoch = rows.div_ceil(batch);
    let (steps, seq_len) = (rows * epochs / batch, length - u64::from(key == RECALL.key));
    format!(
        "\
[model.decoder]
d_model = {width}
n_layers = 2
d_ff = {d_ff}
tie_embeddings = false
head_bias = true
autoencoder = {autoencoder}
attention.softmax = {{ n_heads = {heads}, qkv_bias = true, o_bias = true }}

[data.mad]
task = \"{key}\"
vocab_size = {vocab}
noise_vocab_size = {noise_ids}
noise = {noise:?}
n_copied = {copied}
rows = {rows}
test_rows = {test_rows}

[training]
steps = {steps}
seq_len = {seq_len}
batch_size = {batch}
max_norm = 0

[optimizer.adamw]
lr = {lr:e}
beta1 = 0.9
beta2 = 0.999
weight_decay = {decay:?}
decay_vectors = true

[lr_scheduler]
decay = \"cosine\"
min_lr_ratio = {floor:e}
hold_steps = {per_epoch}

{rest}",
        autoencoder = key == "compression",
        floor = 1e-6 / lr,
        rest = watched(per_epoch.max(10), per_epoch.max(10), Some(0.999)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_settings_as_were_published() {
        let points = (MAD.points)();
        let mut settings: Vec<(String, String)> = points.iter().map(|p| (p.task.clone(), p.setting.clone())).collect();
        settings.dedup();
        assert_eq!((points.len(), settings.len()), (396, 66));
    }
}
