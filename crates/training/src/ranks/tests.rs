#![allow(clippy::unwrap_used)]

use super::threads::on_ranks;
use super::*;

fn config() -> ParallelConfig {
    ParallelConfig { mode: ParallelMode::Data, ..ParallelConfig::default() }
}

#[test]
fn bytes_go_where_they_are_sent() {
    let all = on_ranks(3, config(), |ranks| {
        let me = ranks.rank() as u8;
        let sent = ranks.exchange((0..3).map(|to| vec![me, to]).collect());
        let told = ranks.communicator.broadcast(vec![me; 2], 1);
        (sent, ranks.share((me, f64::NAN.to_bits())), told)
    });
    for (me, (sent, shared, told)) in all.into_iter().enumerate() {
        assert_eq!(sent, [0, 1, 2].map(|from| vec![from, me as u8]));
        assert_eq!(shared, [0, 1, 2].map(|from| (from, f64::NAN.to_bits())));
        assert_eq!(told, [1, 1]);
    }
}

#[test]
fn what_ranks_have_comes_in_the_order_of_the_data() {
    for size in 1..5 {
        let mine = |ranks: &Ranks<'_>| ranks.in_order((ranks.rank()..7).step_by(size).collect::<Vec<_>>());
        assert!(on_ranks(size, config(), mine).into_iter().all(|all| all == [0, 1, 2, 3, 4, 5, 6]), "{size}");
    }
}

/// A failure is stronger than what is put off, and every rank hears of either.
#[test]
fn all_ranks_go_on_or_none() {
    let outcome = |put_off: usize, failed: usize| {
        on_ranks(3, config(), move |ranks| {
            let mine = match ranks.rank() {
                rank if rank == failed => Err(TrainError::Setting("no".into())),
                rank if rank == put_off => Err(TrainError::PutOff),
                _ => Ok(()),
            };
            ranks.agree(mine).map_err(|error| error.to_string())
        })
    };
    assert_eq!(outcome(9, 9), [Ok(()), Ok(()), Ok(())]);
    assert!(outcome(1, 9).iter().all(|one| one.as_ref().unwrap_err().starts_with("put off")));
    let told = |rank: &str| Err(rank.to_owned());
    assert_eq!(outcome(0, 2), [told("rank 2 on thread-2: no"), told("rank 2 on thread-2: no"), told("no")]);
    let made = on_ranks(2, config(), |ranks| {
        let good = ranks.from_first(|| Ok::<_, TrainError>(7 + ranks.rank())).unwrap();
        let bad = ranks.from_first(|| Err::<(), _>(TrainError::Setting("full".into()))).unwrap_err();
        (good, bad.to_string())
    });
    assert_eq!(made, [(7, "full".into()), (7, "rank 0 on thread-0: full".into())]);
}

#[test]
fn ranks_that_begin_with_other_things_are_refused() {
    let told = on_ranks(3, config(), |ranks| {
        ranks.check_same("a hash".into()).unwrap();
        ranks.check_same(["a", "a", "b"][ranks.rank()].into()).unwrap_err().to_string()
    });
    assert!(told.iter().all(|told| told.starts_with("rank 2 on thread-2: its recipe, data or weights")), "{told:?}");
}
