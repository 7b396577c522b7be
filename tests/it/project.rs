//! A person's first hour: a project out of nothing, manual pages, completions.

use crate::world::{SMALL, World};

#[test]
fn a_new_project_trains_compares_and_is_not_written_over() {
    let world = World::new(SMALL);
    let told = world.succeeds(&["new", "here/mine"]).0;
    let file = |name: &str| world.dir.path().join("here/mine").join(name);
    for name in ["README.md", "pretrain.toml", "compare.toml", "data/sample.txt"] {
        assert!(file(name).is_file() && told.contains(name), "{name}: {told}");
    }
    assert!(std::fs::read_to_string(file("README.md")).unwrap().starts_with("# mine\n"));
    assert_eq!(std::fs::read_dir(file("")).unwrap().count(), 4, "and nothing else");
    let here = |args: &[&str]| {
        let output = world.command(args).current_dir(file("")).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    here(&["validate", "pretrain.toml"]);
    assert!(here(&["compare", "compare.toml", "--dry-run", "--no-probe"]).contains("grouped differential"));
    here(&[
        "train",
        "pretrain.toml",
        "training.steps=2",
        "lr_scheduler.warmup_steps=1",
        "validation.batches=1",
        "--out",
        "run",
    ]);
    here(&["generate", "run", "--prompt", "Attention ", "--max-new-tokens", "4"]);

    std::fs::write(file("pretrain.toml"), "mine").unwrap();
    let refused = world.fails(1, &["new", "here/mine"]);
    assert!(refused.contains("here/mine exists already"), "{refused}");
    assert_eq!(std::fs::read_to_string(file("pretrain.toml")).unwrap(), "mine");
}

#[test]
fn every_command_has_a_manual_page() {
    let world = World::new(SMALL);
    world.succeeds(&["man", "--out", "pages/man1"]);
    let page = |name: &str| std::fs::read_to_string(world.dir.path().join("pages/man1").join(name)).unwrap();
    assert!(page("polyhead.1").contains("polyhead\\-train(1)"));
    assert!(page("polyhead-train.1").contains("\\-\\-resume"));
    assert!(page("polyhead-tokenizer-train.1").contains("\\-\\-vocab\\-size"));
}
