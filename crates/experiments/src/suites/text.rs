//! Questions about long texts: RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654) and stories in the manner of
//! BABILong (Kuratov et al. 2024, arXiv 2406.10149). The published suites ask a trained model; those that end in -small train one
//! on rows of the same law first.

use polyhead_data::text_suites::{BabiTask, RulerTask, TextTask};

use super::{Point, Questions, Score, Suite, watched};

const WORDING: &str =
    "wording: ours; words are made of syllables, backgrounds of generated sentences or of the text of --background";

pub(super) const RULER: Suite = Suite {
    name: "ruler-synthetic-v1",
    about: "needles, variable tracking, common and frequent words in texts of 4096 to 131072 tokens; asks a trained model (--model)",
    paper: "Hsieh et al. 2024, RULER, arXiv 2404.06654, without niah_single_2/3, multikey_1 and question answering",
    differs: &[WORDING],
    points: Vec::new,
    questions: Some(Questions {
        tasks: || RulerTask::ALL.map(TextTask::Ruler).to_vec(),
        lengths: &[4096, 8192, 16_384, 32_768, 65_536, 131_072],
        rows: 500,
        seed: 42,
    }),
};

pub(super) const RULER_SMALL: Suite = Suite {
    name: "ruler-synthetic-v1-small",
    about: "needles and frequent words in texts of 512 bytes, asked at 1024 too; trains a model of width 64 on each task",
    paper: "after Hsieh et al. 2024, RULER, arXiv 2404.06654",
    // The shortest text of niah_multikey_3 has more than 512 bytes.
    differs: &[
        WORDING,
        "models: trained on each task; an answer counts if every token of it is the model's first choice",
    ],
    points: || {
        [RulerTask::NiahSingle1, RulerTask::NiahMultikey2, RulerTask::Fwe]
            .map(|task| trained("ruler", TextTask::Ruler(task)))
            .to_vec()
    },
    questions: None,
};

pub(super) const BABILONG: Suite = Suite {
    name: "babilong-like-v1",
    about: "facts scattered in a background of 1024 to 131072 tokens, with a question; asks a trained model (--model)",
    paper: "after Kuratov et al. 2024, BABILong, arXiv 2406.10149; not comparable with it",
    differs: &[
        "stories: by our own simulator of bAbI's tasks 1 to 5; backgrounds of generated sentences or of --background",
    ],
    points: Vec::new,
    questions: Some(Questions {
        tasks: || BabiTask::ALL.map(TextTask::Babi).to_vec(),
        lengths: &[1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072],
        rows: 100,
        seed: 42,
    }),
};

pub(super) const BABILONG_SMALL: Suite = Suite {
    name: "babilong-like-v1-small",
    about: "facts scattered in a background of 512 bytes, asked at 1024 too; trains a model of width 64 on each task",
    paper: "after Kuratov et al. 2024, BABILong, arXiv 2406.10149; not comparable with it",
    differs: &["models: trained on each task; an answer counts if every token of it is the model's first choice"],
    points: || BabiTask::ALL.map(|task| trained("babilong_like", TextTask::Babi(task))).to_vec(),
    questions: None,
};

/// A small model that is trained on a task, and asked at twice its length and at its length, which is what the score is of.
fn trained(source: &str, task: TextTask) -> Point {
    let name = task.name();
    let recipe = format!(
        "\
[model.decoder]
d_model = 64
n_layers = 2
attention.softmax = {{ n_heads = 4 }}

[data.{source}]
task = \"{name}\"
test = [1024, 512]
test_rows = 100

[training]
steps = 2400
seq_len = 512
batch_size = 16

[optimizer.adamw]
lr = 2e-3
weight_decay = 0.1

[lr_scheduler]
warmup_steps = 100

{rest}
[generation.sampling]
max_new_tokens = 1
",
        rest = watched(200, 20, None),
    );
    let (setting, size, cell) = (String::new(), String::new(), String::new());
    Point { task: name.into(), setting, size, cell, score: Score::Exact, recipe }
}
