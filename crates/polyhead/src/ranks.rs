//! The ranks of `train`: joining the job of a launcher such as mpirun, and leaving it.

use polyhead_recipe::{Loaded, Problems};
use polyhead_runs::Failure;
use polyhead_training::config::ParallelMode;
use polyhead_training::ranks::Communicator;

/// Where launchers say how many processes they have started: Open MPI, MPICH and its kin, MVAPICH, Slurm.
const SIZES: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];

/// Where they say which of the processes on its machine this one is.
const LOCAL_RANKS: [&str; 4] =
    ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"];

/// The first of these variables of the environment that is a number, and that number.
fn number(names: [&'static str; 4]) -> Option<(&'static str, usize)> {
    names.into_iter().find_map(|name| Some((name, std::env::var(name).ok()?.trim().parse().ok()?)))
}

/// Which of the ranks on its machine this process is.
pub fn local_rank() -> usize {
    number(LOCAL_RANKS).map_or(0, |(_, rank)| rank)
}

/// Refuses a recipe that several ranks cannot train.
///
/// # Errors
/// Names the key, the rule and the way out.
pub fn check(loaded: &Loaded, size: usize) -> Result<(), Failure> {
    let passes = loaded.recipe.training.gradient_accumulation_steps;
    if size > 1 && loaded.recipe.parallel.mode != ParallelMode::Data {
        let problem = format!(
            "{size} ranks were started, and parallel.mode = \"none\" trains on one: set parallel.mode = \"data\""
        );
        return Err(loaded.problem("parallel.mode", problem).into());
    }
    if size > passes {
        let key = "training.gradient_accumulation_steps";
        let problem = format!(
            "{key} ({passes}) must be at least the number of ranks ({size}): it counts the forward passes of a step on all ranks, which \
             are divided among them; raise it, or start fewer ranks"
        );
        return Err(loaded.problem(key, problem).into());
    }
    Ok(())
}

/// Runs `train` as one of the processes that a launcher has started; without a launcher, alone.
#[cfg(not(feature = "mpi"))]
pub fn within(train: impl FnOnce(Option<&dyn Communicator>) -> Result<(), Failure>) -> Result<(), Failure> {
    match number(SIZES) {
        Some((name, size)) if size > 1 => Err(Problems::plain(format!(
            "{name}={size}: a launcher has started {size} processes, and this binary was built without MPI, so that each would train the \
             same run; build with `cargo build --release --features mpi` (docs: Several machines), or start one process"
        ))
        .into()),
        _ => train(None),
    }
}

#[cfg(feature = "mpi")]
pub use job::within;

#[cfg(feature = "mpi")]
mod job {
    use std::panic::{set_hook, take_hook};
    use std::time::Duration;

    use polyhead_training::ranks::mpi::{Mpi, abort_job};

    use super::*;
    use crate::console::{hush, say_aloud, talk};
    use crate::gpu_memory::is_out_of_memory;

    /// How long a rank that has failed waits for the others to fail too, before it ends them; chosen by us.
    const PATIENCE: Duration = Duration::from_secs(3);

    /// What a process exits with after a panic.
    const PANICKED: i32 = 101;

    /// Runs `train` as one of the processes that a launcher has started; alone, which takes no MPI, where it has started one. Rank 0 speaks
    /// for all; another is heard where it alone fails.
    pub fn within(train: impl FnOnce(Option<&dyn Communicator>) -> Result<(), Failure>) -> Result<(), Failure> {
        let Some((name, size)) = number(SIZES).filter(|(_, size)| *size > 1) else { return train(None) };
        let job = Mpi::join().ok_or_else(|| Failure::Run("this process has joined an MPI job before".into()))?;
        if job.size() != size {
            return Err(Problems::plain(format!(
                "{name}={size}, and MPI knows {} ranks: the launcher and the library do not speak with each other; start with the mpirun of \
                 the MPI that this binary was built with, or with `srun --mpi=pmix`",
                job.size()
            ))
            .into());
        }
        if job.rank() > 0 {
            hush();
        }
        end_all_on_panic(&job);
        let outcome = train(Some(&job));
        leave(&job, outcome)
    }

    /// The others would wait for a rank that has panicked for ever.
    fn end_all_on_panic(job: &Mpi) {
        let (rank, host, others) = (job.rank(), job.host(), take_hook());
        set_hook(Box::new(move |panic| {
            others(panic);
            // What a GPU without memory says becomes an error.
            if !panic.payload_as_str().is_some_and(is_out_of_memory) {
                say_aloud(&format!("rank {rank} on {host} panicked, which ends the job"));
                abort_job(PANICKED);
            }
        }));
    }

    /// Leaves with all ranks, where all have come to their ends; where others are in the middle of something that this one will not take
    /// part in, ends them.
    fn leave(job: &Mpi, outcome: Result<(), Failure>) -> Result<(), Failure> {
        if let Err(failure) = &outcome {
            talk!("{failure}"); // before any process ends, because launchers end the others then
        }
        let all_leave = job.barrier(outcome.is_err().then_some(PATIENCE));
        if let (Err(failure), false) = (&outcome, all_leave) {
            if job.rank() > 0 {
                say_aloud(&format!("rank {} on {}: {failure}", job.rank(), job.host()));
            }
            job.abort(crate::code(failure).into());
        }
        hush();
        outcome
    }
}
