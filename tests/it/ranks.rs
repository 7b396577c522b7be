//! What a single process says of several ranks. That they train as one does is tested where ranks are threads
//! (crates/training/src/run/tests.rs), and with MPI by tests/mpi/run.sh.

use crate::resume::fingerprint;
use crate::world::{SMALL, World};

const TRAIN: [&str; 4] = ["train", "recipe.toml", "--out", "run"];

/// Each of them would train the same run.
#[test]
#[cfg(not(feature = "mpi"))]
fn processes_that_a_launcher_started_are_refused_without_mpi() {
    let world = World::new(SMALL);
    for (name, size) in [("OMPI_COMM_WORLD_SIZE", "4"), ("PMI_SIZE", "2"), ("SLURM_STEP_NUM_TASKS", "16")] {
        let output = world.command(&TRAIN).env(name, size).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{err}");
        assert!(
            err.contains(&format!("{name}={size}")) && err.contains("cargo build --release --features mpi"),
            "{err}"
        );
        assert!(!world.dir.path().join("run").exists());
    }
    let one = world.command(&[&TRAIN[..], &["training.steps=1"]].concat()).env("OMPI_COMM_WORLD_SIZE", "1").output();
    assert!(one.unwrap().status.success());
}

/// The same bits as without the table, which a run may change when it goes on.
#[test]
fn one_process_trains_as_ever_whatever_is_divided() {
    let world = World::new(SMALL);
    let train = |run: &str, more: &[&str]| {
        world.succeeds(&[&["train", "recipe.toml", "lr_scheduler.decay=constant", "--out", run], more].concat())
    };
    train("plain", &[]);
    train("run", &["parallel.mode=data", "parallel.optimizer_sharding=zero1", "training.steps=7"]);
    train("run", &["parallel.mode=data", "parallel.gradient_reduction=fast"]);
    let (plain, parallel) = (fingerprint(&world, "plain"), fingerprint(&world, "run"));
    assert!((plain.0, plain.1) == (parallel.0, parallel.1), "weights or state differ");
}

#[test]
fn settings_that_mean_nothing_are_refused() {
    let world = World::new(SMALL);
    let told = |settings: &[&str]| world.fails(2, &[&["validate", "recipe.toml"], settings].concat());
    let err = told(&["parallel.optimizer_sharding=zero1"]);
    assert!(err.contains("parallel.optimizer_sharding") && err.contains("parallel.mode = \"data\""), "{err}");
    let err = told(&["parallel.mode=data", "procedure.boundaries={}"]);
    assert!(err.contains("procedure.boundaries trains on one rank"), "{err}");
    world.succeeds(&["validate", "recipe.toml", "parallel.mode=data", "procedure.bilevel.rank=2"]);
    let err = told(&["parallel.mode=pipeline"]);
    assert!(err.contains("`none` or `data`"), "{err}");
    let err = told(&["parallel.modes=data"]);
    assert!(err.contains("did you mean `mode`?"), "{err}");
}
