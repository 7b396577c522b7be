//! Signals are heard whatever a run is busy with, and nothing that was done is lost.
#![cfg(unix)]

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::resume::fingerprint_at;
use crate::world::{SMALL, World};

const RECIPE: &str = "recipe.toml";

fn send(child: &Child, signal: &str) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Hears SIGHUP even where the tests themselves were started under `nohup`.
fn hearing(mut command: Command) -> Command {
    let default = || {
        // SAFETY: a system call without pointers, which may be made between fork and exec.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: `default` allocates nothing.
    unsafe { command.pre_exec(default) };
    command
}

fn wait_for(what: &str, child: &mut Child, mut holds: impl FnMut() -> bool) {
    let since = Instant::now();
    while !holds() {
        assert!(child.try_wait().unwrap().is_none(), "ended by itself before {what}");
        assert!(since.elapsed() < Duration::from_secs(60), "{what} never came");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn lines(world: &World, run: &str) -> usize {
    let log = std::fs::read_to_string(world.dir.path().join(run).join("metrics.jsonl"));
    log.map_or(0, |text| text.lines().count())
}

fn steps_saved(world: &World, run: &str) -> Vec<String> {
    let entries = std::fs::read_dir(world.dir.path().join(run)).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut steps: Vec<String> = names.filter(|name| name.starts_with("step-")).collect();
    steps.sort();
    steps
}

#[test]
fn a_dropped_connection_saves_and_leaves_and_a_scheduler_saves_and_goes_on() {
    let world = World::new(&SMALL.replace("steps = 12", "steps = 1000000").replace("interval = 4", "interval = 0"));
    // Into a file: a pipe that nobody empties would stop the run.
    let told = std::fs::File::create(world.dir.path().join("told.txt")).unwrap();
    let mut child = hearing(world.command(&["train", RECIPE, "--out", "run"])).stderr(told).spawn().unwrap();
    wait_for("the first steps", &mut child, || lines(&world, "run") > 5);
    assert!(steps_saved(&world, "run").is_empty());
    send(&child, "-USR1");
    wait_for("a checkpoint", &mut child, || steps_saved(&world, "run").len() == 1);
    let before = lines(&world, "run");
    wait_for("further steps", &mut child, || lines(&world, "run") > before + 5);
    send(&child, "-HUP");
    assert_eq!(child.wait().unwrap().code(), Some(129));
    assert_eq!(steps_saved(&world, "run").len(), 2);
    let err = String::from_utf8(world.read("told.txt")).unwrap();
    assert!(err.contains("SIGUSR1: saving") && err.contains("SIGHUP: saving"), "{err}");
}

#[test]
fn nohup_outlives_the_connection() {
    let world = World::new(&SMALL.replace("steps = 12", "steps = 1000000"));
    let binary = env!("CARGO_BIN_EXE_polyhead");
    let script = format!("trap '' HUP; exec {binary} train {RECIPE} --out run 2>/dev/null");
    let mut child = Command::new("sh").args(["-c", &script]).current_dir(world.dir.path()).spawn().unwrap();
    wait_for("the first steps", &mut child, || lines(&world, "run") > 5);
    send(&child, "-HUP");
    let before = lines(&world, "run");
    wait_for("further steps", &mut child, || lines(&world, "run") > before + 20);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A validation of minutes is put off by a signal, and made up for: the run ends as one that nothing interrupted.
#[test]
fn a_validation_is_put_off_and_made_up_for() {
    let long = "validation.batches=1000000";
    let all = ["train", RECIPE, "lr_scheduler.decay=constant", "validation.interval=5", "validation.fraction=0.5"];
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"book.txt\"]"));
    // Held out: enough for minutes of validation.
    let text: String = (0..400_000u32).map(|i| format!("{} ", i.wrapping_mul(2_654_435_761) >> 12)).collect();
    std::fs::write(world.dir.path().join("book.txt"), text).unwrap();
    world.succeeds(&[&all[..], &["--out", "whole"]].concat());
    for (signal, code) in [("-TERM", 143), ("-INT", 130), ("-USR2", 140)] {
        let run = format!("run{signal}");
        let mut child =
            world.command(&[&all[..], &["--out", &run, long]].concat()).stderr(Stdio::null()).spawn().unwrap();
        wait_for("step 5", &mut child, || lines(&world, &run) >= 5);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(lines(&world, &run), 5, "it validates");
        let since = Instant::now();
        send(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
        assert!(steps_saved(&world, &run).contains(&"step-00000005".to_owned()));
        world.succeeds(&[&all[..], &["--out", &run]].concat());
        let (whole, parts) = (fingerprint_at(&world, "whole", 12), fingerprint_at(&world, &run, 12));
        assert!(whole.0 == parts.0 && whole.1 == parts.1, "weights or optimiser state differ");
        assert_eq!(whole.2, parts.2, "every line once, the validation at step 5 among them");
        assert_eq!(world.read("whole/best.json"), world.read(&format!("{run}/best.json")));
    }
}

/// Opening the data may take minutes; here a chat template that counts to 100,000 is rendered for 5000 conversations.
#[test]
fn signals_are_heard_while_the_data_is_opened() {
    let chats = "[data.chat]\npaths = [\"chats.jsonl\"]\ntemplate = \"slow.jinja\"\n[tokenizer.bytes]\n";
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", chats));
    let slow =
        "{% for i in range(100000) %}{% endfor %}{% for m in messages %}{{ m.role[0] }}{{ m.content }},{% endfor %}";
    std::fs::write(world.dir.path().join("slow.jinja"), slow).unwrap();
    let chat = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    std::fs::write(world.dir.path().join("chats.jsonl"), format!("{chat}\n").repeat(5000)).unwrap();
    for (signal, code) in [("-TERM", 143), ("-INT", 130), ("-HUP", 129)] {
        let run = format!("run{signal}");
        let mut child =
            hearing(world.command(&["train", RECIPE, "--out", &run])).stderr(Stdio::piped()).spawn().unwrap();
        let lock = world.dir.path().join(&run).join(".lock");
        wait_for("the lock", &mut child, || lock.exists());
        std::thread::sleep(Duration::from_millis(200));
        send(&child, "-USR1");
        std::thread::sleep(Duration::from_millis(100));
        assert!(child.try_wait().unwrap().is_none(), "SIGUSR1 ends nothing");
        let since = Instant::now();
        send(&child, signal);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    }
}
