//! Files as people have them: what is left out is told, what is written never becomes data, and what was killed is typed again.

use crate::world::World;

const BOOKS: &str = r#"
[model.decoder]
d_model = 16
n_layers = 1
d_ff = 32
[model.decoder.attention.softmax]
n_heads = 4
[tokenizer.bytes]
[data.text]
paths = ["books"]
[training]
steps = 1
seq_len = 16
batch_size = 2
[validation]
fraction = 0.3
interval = 0
[generation]
sampling = { max_new_tokens = 1 }
"#;

/// A folder with a recipe, a book, one in Latin-1, rows of JSON, and what is no text.
fn library() -> World {
    let world = World::new(BOOKS);
    let books = world.dir.path().join("books");
    std::fs::create_dir(&books).unwrap();
    std::fs::write(books.join("a.txt"), "It was a dark and stormy night. ".repeat(20)).unwrap();
    std::fs::write(books.join("b.txt"), b"Das Caf\xe9 war leer.").unwrap();
    std::fs::write(books.join("rows.json"), "{\"text\": \"a\"}\n{\"text\": \"b\"}\n").unwrap();
    std::fs::write(books.join("cover.png"), b"\x89PNG").unwrap();
    world
}

#[test]
fn what_a_folder_holds_besides_text_is_told_and_what_is_named_is_refused() {
    let world = library();
    for args in [&["plan", "recipe.toml", "--no-probe"][..], &["train", "recipe.toml", "--out", "run"]] {
        let (_, err) = world.succeeds(args);
        for part in ["b.txt", "not UTF-8", "1 that end in .png", "rows.json", "1 text file ("] {
            assert!(args[0] == "plan" || err.contains(part), "{args:?}: no {part} in {err}");
        }
    }
    for (path, words) in [("books/b.txt", "Latin-1"), ("books/rows.json", "data.jsonl"), ("books/cover.png", "PNG")] {
        let err = world.fails(1, &["train", "recipe.toml", &format!("data.text.paths=[\"{path}\"]"), "--out", "other"]);
        assert!(err.contains(path) && err.contains(words), "{err}");
    }
}

#[test]
fn a_run_inside_of_its_own_data_is_refused_before_anything_is_written() {
    let world = library();
    for paths in ["[\"books\"]", "[\"books/**/*.toml\", \"books/a.txt\"]"] {
        let err = world.fails(2, &["train", "recipe.toml", &format!("data.text.paths={paths}"), "--out", "books/run"]);
        assert!(err.contains("books/run is inside what data.text reads") && err.contains("--out"), "{err}");
        assert!(!world.dir.path().join("books/run").exists());
    }
    let err = world.fails(2, &["train", "recipe.toml", "data.text.paths=[\".\"]"]);
    assert!(err.contains("checkpoints/recipe is inside"), "{err}");
    world.succeeds(&["train", "recipe.toml", "data.text.paths=[\"books/a*.txt\"]", "--out", "run"]);
}

#[test]
fn a_killed_export_or_conversion_is_finished_by_the_same_command() {
    let world = library();
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    let convert = ["convert", "run", "--to", "grouped_query", "--kv-heads", "2", "--out", "lean"];
    let grow = ["grow", "run", "--width", "x2", "--out", "wide"];
    for (args, to) in [(&["export", "run", "--to", "hf"][..], "hf"), (&convert, "lean"), (&grow, "wide")] {
        // What a kill leaves: half of the folder, with its lock.
        let partial = world.dir.path().join(format!("{to}.partial"));
        std::fs::create_dir_all(partial.join("step-000000")).unwrap();
        ["config.json", ".lock", ".tmp-1-0"].iter().for_each(|name| std::fs::write(partial.join(name), "1").unwrap());
        let (_, err) = world.succeeds(args);
        assert!(err.contains("cleaned up after an interrupted command"), "{err}");
        assert!(!partial.exists() && !world.dir.path().join(to).join(".lock").exists());
        assert!(!world.dir.path().join(to).join(".tmp-1-0").exists());
    }
    let (_, err) = world.succeeds(&["export", "run", "--to", "hf"]);
    assert!(err.contains("hf holds this export already, whole"), "{err}");
    let config = world.dir.path().join("hf/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text + "\n").unwrap();
    assert!(world.fails(1, &["export", "run", "--to", "hf"]).contains("exists already"));
    assert!(world.fails(1, &convert).contains("exists already"));
    world.succeeds(&["generate", "lean", "--prompt", "It was"]);
}
