//! What a GPU reports by a panic where its results are read: that it ran out of memory. Here it becomes an error that says what to
//! change; every other panic stays one.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook};

use polyhead_runs::Failure;

/// What the runtime of Burn's GPU backends says, by its errors' names and in their words.
const SIGNS: [&str; 6] = [
    "out of device memory",
    "OutOfMemory",
    "can't allocate buffer",
    "BufferTooBig",
    "every page size the memory tracks",
    "PageSizesExhausted",
];

/// What `command` gives; a GPU without memory for it is a failed run.
pub fn caught(command: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    let others = take_hook();
    set_hook(Box::new(move |panic| {
        if !panic.payload_as_str().is_some_and(is_out_of_memory) {
            others(panic);
        }
    }));
    catch_unwind(AssertUnwindSafe(command)).unwrap_or_else(|panic| match words(&*panic) {
        Some(words) if is_out_of_memory(words) => Err(Failure::Run(problem(words))),
        _ => resume_unwind(panic),
    })
}

fn words(panic: &(dyn Any + Send)) -> Option<&str> {
    panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied())
}

/// Whether a panic says that a GPU has no memory left.
pub fn is_out_of_memory(words: &str) -> bool {
    SIGNS.iter().any(|sign| words.contains(sign))
}

fn problem(words: &str) -> String {
    let at = SIGNS.iter().filter_map(|sign| words.find(sign)).min().unwrap_or(0);
    let said = words[at..].lines().next().unwrap_or_default();
    format!(
        "the GPU has no memory left ({said})\n  hint: training.batch_size with training.gradient_accumulation_steps, \
         training.activation_checkpointing = \"block\", training.precision = \"bf16\" or training.seq_len take less; `polyhead plan` \
         tells what takes how much, `nvidia-smi` which programs share the GPU; checkpoints that were saved are whole: `train` goes on from \
         the last one"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_without_memory_is_a_failed_run_and_other_panics_stay() {
        let failed =
            caught(|| panic!("Error while reading data: out of device memory allocating 1024 bytes\n   0: backtrace"));
        let told = failed.expect_err("no memory").to_string();
        assert!(told.contains("(out of device memory allocating 1024 bytes)\n"), "{told}");
        assert!(told.contains("training.batch_size") && !told.contains("backtrace"), "{told}");
        assert!(caught(|| Ok(())).is_ok());
        assert!(catch_unwind(|| caught(|| panic!("a bug of ours"))).is_err());
    }
}
