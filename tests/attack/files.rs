//! Hostile files: small good ones of every kind with some bytes or words changed. They are used or refused, and nothing else.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::case::{Case, Held, How, Tried, ensure};
use crate::specimens::{self, Specimen, Tree};
use crate::{Kind, mutate, runs};

/// In MiB: what a reader of a few kilobytes may take, the reserves of its threads included.
const MEMORY: u64 = 1536;

/// The specimen whose hashes are made to fit again.
const SEALED: &str = "checkpoint";

/// Mutated data, models, tokenizers and templates.
#[derive(Default)]
pub struct Files {
    specimens: Vec<Specimen>,
}

impl Kind for Files {
    fn name(&self) -> &'static str {
        "files"
    }

    fn prepare(&mut self, case: &mut Case) -> Held {
        self.specimens = specimens::all();
        self.specimens.extend(models(case)?);
        for (number, specimen) in self.specimens.iter().enumerate() {
            // Each is good as it is: else the changes would tell nothing.
            for command in &specimen.commands {
                let mut whole =
                    Case::new(&case.dir.join(format!("good-{number}")), case.binary(), case.random.clone())?;
                write(&whole, &specimen.tree)?;
                whole.run(&[0], command)?;
            }
        }
        Ok(())
    }

    fn attack(&mut self, case: &mut Case) -> Held<Tried> {
        let specimen = &self.specimens[case.random.below(self.specimens.len())];
        let is_target = |name: &str| specimen.targets.iter().any(|target| name.starts_with(target));
        let targets: Vec<&String> = specimen.tree.keys().filter(|name| is_target(name)).collect();
        let target = (*case.random.pick(&targets)).clone();
        let good = &specimen.tree[&target];
        let random = &mut case.random;
        let bad = match target.rsplit('.').next().unwrap_or_default() {
            "json" | "jsonl" => mutate::json_text(random, good),
            "safetensors" => mutate::safetensors(random, good),
            "png" => mutate::png(random, good),
            "gz" => mutate::gzip(random, good),
            "jinja" => mutate::template(random, good),
            _ => mutate::bytes(random, good),
        };
        write(case, &specimen.tree)?;
        case.write(&target, &bad)?;
        if specimen.name == SEALED {
            seal(&case.dir.join("checkpoint"))?;
        }
        case.note(&format!("{}: {target} is changed", specimen.name));
        let command = case.random.pick(&specimen.commands).clone();
        let how = How { memory: MEMORY, seconds: 30, ..How::default() };
        let answer = case.run_as(&how, &command)?.ends(&[0, 1, 2])?;
        // Whoever reads the message must know which file it is about, or which data there is too little of.
        let name = target.rsplit('/').next().unwrap_or_default();
        let folder = target.split('/').next().unwrap_or_default();
        let words = ["data.", "examples", "validation.fraction", "training.", "chat template", "not finite"];
        let names = |text: &str| [name, folder].iter().chain(&words).any(|word| text.contains(word));
        ensure!(answer.code == Some(0) || names(&answer.err), "{target} is not named: {}", answer.err);
        Ok(Tried::Held)
    }
}

/// Writes a manifest's lengths and hashes anew, so that the files are found to be what they are.
fn seal(checkpoint: &Path) -> Held {
    let path = checkpoint.join("manifest.json");
    let Some(mut manifest) = runs::json(&path).ok().filter(Value::is_object) else { return Ok(()) };
    for entry in manifest["files"].as_array_mut().into_iter().flatten() {
        let Ok(bytes) = std::fs::read(checkpoint.join(entry["name"].as_str().unwrap_or_default())) else { continue };
        entry["bytes"] = bytes.len().into();
        entry["blake3"] = blake3::hash(&bytes).to_string().into();
    }
    manifest["manifest_blake3"] = "0".repeat(64).into();
    let text = format!("{manifest:#}\n");
    manifest["manifest_blake3"] = blake3::hash(text.as_bytes()).to_string().into();
    Ok(std::fs::write(path, format!("{manifest:#}\n"))?)
}

fn write(case: &Case, tree: &Tree) -> Held {
    tree.iter().try_for_each(|(name, bytes)| case.write(name, bytes))
}

/// Folders in Hugging Face's format: one that the binary exports, with a tokenizer and a template, and one with a plain config.
fn models(case: &mut Case) -> Held<Vec<Specimen>> {
    let recipe = runs::recipes(4).swap_remove(0).1;
    case.write("recipe.toml", recipe)?;
    case.write("book.txt", runs::book())?;
    case.run(&[0], &["tokenizer", "train", "recipe.toml", "--vocab-size", "270", "--out", "bpe/tokenizer.json"])?;
    case.run(&[0], &["train", "recipe.toml", "tokenizer.huggingface.path=bpe", "--out", "run"])?;
    case.run(&[0], &["export", "run", "--to", "model"])?;
    let config = case.dir.join("model/tokenizer_config.json");
    let mut settings = runs::json(&config)?;
    settings["chat_template"] = specimens::TEMPLATE.into();
    std::fs::write(config, settings.to_string())?;
    let mut tree = folder(&case.dir.join("model"), "model")?;
    let tokenizer = tree["model/tokenizer.json"].clone();
    tree.extend([("bpe/tokenizer.json".to_owned(), tokenizer), ("book.txt".to_owned(), runs::book().into_bytes())]);
    let data = "[data.text]\npaths = [\"book.txt\"]\n";
    let rest = "[training]\nsteps = 1\nseq_len = 16\nbatch_size = 2\n[validation]\nbatches = 1\n";
    tree.insert("tune.toml".into(), format!("[model]\npretrained = \"model\"\n{data}{rest}").into());
    tree.insert(
        "bpe.toml".into(),
        format!(
            "[tokenizer.huggingface]\npath = \"bpe\"\n[model.decoder]\nd_model = 16\nn_layers = 1\n\
                 [model.decoder.attention.softmax]\nn_heads = 2\n{data}{rest}"
        )
        .into(),
    );
    let model = Specimen {
        name: "model",
        tree: tree.clone(),
        targets: vec!["model/"],
        commands: vec![
            vec!["generate", "model", "--prompt", "the cat", "--max-new-tokens", "4"],
            vec!["generate", "model", "--chat", "--prompt", "the cat", "--max-new-tokens", "4"],
            vec!["logits", "model", "--tokens", "1,2,3", "--out", "logits.safetensors"],
            vec!["export", "model", "--to", "again"],
            vec!["train", "tune.toml", "--out", "tuned"],
            vec![
                "convert",
                "model",
                "--to",
                "grouped_query",
                "--kv-heads",
                "1",
                "--text-file",
                "book.txt",
                "--out",
                "fewer",
            ],
        ],
    };
    let tokenizer = Specimen {
        name: "tokenizer",
        tree,
        targets: vec!["bpe/"],
        commands: vec![vec!["preview", "bpe.toml", "--rows", "1"]],
    };
    // A checkpoint from a stranger: its manifest fits whatever the files hold.
    let step = format!("run/{}", runs::checkpoints(&case.dir.join("run"))?.pop().unwrap_or_default());
    let mut tree = folder(&case.dir.join(step), "checkpoint")?;
    tree.insert("book.txt".into(), runs::book().into_bytes());
    tree.insert("tune.toml".into(), format!("{data}{rest}").into());
    let rows = (0..8).map(|i| format!("{{\"text\": \"the cat {i}\", \"label\": {}}}\n", i % 2)).collect::<String>();
    tree.insert("rows.jsonl".into(), rows.into());
    let checkpoint = Specimen {
        name: SEALED,
        tree,
        targets: vec!["checkpoint/"],
        commands: vec![
            vec!["generate", "checkpoint", "--prompt", "the cat", "--max-new-tokens", "4"],
            vec!["logits", "checkpoint", "--tokens", "1,2,3", "--out", "logits.safetensors"],
            vec!["export", "checkpoint", "--to", "again"],
            vec!["eval", "checkpoint", "--batches", "1"],
            vec!["inspect", "checkpoint", "--rows", "1"],
            vec!["convert", "checkpoint", "--to", "grouped_query", "--kv-heads", "1", "--out", "fewer"],
            vec!["grow", "checkpoint", "--width", "x2", "--out", "grown"],
            vec!["features", "checkpoint", "--data", "rows.jsonl", "--out", "features.safetensors"],
            vec!["train", "tune.toml", "model.pretrained=checkpoint", "--out", "tuned"],
        ],
    };
    let mut all = vec![model, tokenizer, checkpoint];
    all.extend(foreign()?);
    Ok(all)
}

/// The small models that transformers wrote, of every architecture that is read.
fn foreign() -> Held<Vec<Specimen>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/hf"))? {
        let path = entry?.path();
        paths.extend(path.join("config.json").exists().then_some(path));
    }
    paths.sort();
    let specimen = |path: &PathBuf| {
        let mut tree = folder(path, "model")?;
        tree.retain(|name, _| !name.contains("expected"));
        let logits = vec!["logits", "model", "--tokens", "1,2,3", "--out", "logits.safetensors"];
        let commands = vec![logits, vec!["export", "model", "--to", "again"]];
        Ok(Specimen { name: "foreign", tree, targets: vec!["model/"], commands })
    };
    paths.iter().map(specimen).collect()
}

fn folder(path: &Path, name: &str) -> Held<Tree> {
    let mut tree = Tree::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        tree.insert(format!("{name}/{}", entry.file_name().to_string_lossy()), std::fs::read(entry.path())?);
    }
    Ok(tree)
}
