//! The threads that share the work of an operation.
//!
//! A step is hundreds of operations of some ten microseconds, one after another, so threads wait for
//! the next one awake, for a while: to wake a thread can take as long as such an operation. Every thread
//! has a part of the tasks, the same of each operation that has as many, so that what it reads and
//! writes is in its own caches; when its part is done it helps with the others'.

use std::{
    any::Any,
    cell::UnsafeCell,
    hint,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
            fence,
        },
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::error::{Error, Result};

/// How long a thread waits awake: longer than the caller takes from one operation of a step to the
/// next. While the host plans a step, it sleeps.
const AWAKE: Duration = Duration::from_micros(100);

/// The caller's thread, and threads that help it.
pub(super) struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by the caller whose work is shared.
    busy: Mutex<()>,
}

struct Shared {
    gate: Gate,
    /// Written while the gate is shut and nobody is inside, read by those inside.
    work: UnsafeCell<Option<Work>>,
    /// Of each thread's part, how many tasks are taken.
    taken: Box<[Counter]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Whether waiting threads stay awake for a while: where each has a core.
    spin: bool,
    stop: AtomicBool,
    asleep: AtomicU32,
    door: Mutex<()>,
    opened: Condvar,
}

// SAFETY: `work` is written only under the conditions of its comment, and all else is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: likewise; what `work` points to is `Sync`, and outlives the time the gate is open.
unsafe impl Send for Shared {}

/// In a cache line, and its neighbour, of its own.
#[repr(align(128))]
struct Counter(AtomicUsize);

#[derive(Clone, Copy)]
struct Work {
    tasks: usize,
    task: *const (dyn Fn(usize) + Sync),
}

/// How often it was opened or shut (odd: it is open), above the number of helpers inside.
struct Gate(AtomicU64);

const INSIDE: u64 = 0xffff;
const TURN: u64 = INSIDE + 1;

impl Gate {
    fn is_open(state: u64) -> bool {
        state / TURN % 2 == 1
    }

    /// Goes in, unless the gate has shut or this turn was seen.
    fn enter(&self, seen: &mut u64) -> bool {
        let state = self.0.load(Acquire);
        if !Self::is_open(state) || state / TURN == *seen {
            return false;
        }
        let entered = self.0.compare_exchange(state, state + 1, AcqRel, Relaxed).is_ok();
        if entered {
            *seen = state / TURN;
        }
        entered
    }
}

impl Pool {
    /// A pool of `threads` threads, one of which is the caller's.
    pub(super) fn new(threads: usize) -> Result<Self> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let shared = Arc::new(Shared {
            gate: Gate(AtomicU64::new(0)),
            work: UnsafeCell::new(None),
            taken: (0..threads.max(1)).map(|_| Counter(AtomicUsize::new(0))).collect(),
            panic: Mutex::new(None),
            spin: threads <= cores,
            stop: AtomicBool::new(false),
            asleep: AtomicU32::new(0),
            door: Mutex::new(()),
            opened: Condvar::new(),
        });
        let mut pool = Self { shared, helpers: Vec::new(), busy: Mutex::new(()) };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let helper = thread::Builder::new()
                .name(format!("inkling-{index}"))
                .spawn(move || shared.help(index))
                .map_err(|error| Error::new(format!("cannot start {threads} threads: {error}")))?;
            pool.helpers.push(helper);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub(super) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `task` for `0..tasks`, in any order, on all threads. Within a task, or while another
    /// thread's work is shared, on the caller's alone.
    pub(super) fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        let alone = tasks <= 1 || self.helpers.is_empty();
        let turn = if alone { None } else { self.busy.try_lock().ok() };
        if turn.is_none() {
            return (0..tasks).for_each(task);
        }
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: the same reference but for its lifetime; helpers use it only inside the gate,
        // which is shut, and empty, before this call ends, be it by a panic.
        let task: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(task) };
        let shared = &*self.shared;
        // SAFETY: the gate is shut and nobody is inside: the last turn ended so, and `turn` is ours.
        unsafe { *shared.work.get() = Some(Work { tasks, task }) };
        shared.taken.iter().for_each(|taken| taken.0.store(0, Relaxed));
        shared.gate.0.fetch_add(TURN, AcqRel);
        shared.wake();
        let result = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(Work { tasks, task }, 0)));
        shared.gate.0.fetch_add(TURN, AcqRel);
        shared.wait(|| shared.gate.0.load(Acquire) & INSIDE == 0);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = result.err().or(panic) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Release);
        self.shared.wake();
        for helper in self.helpers.drain(..) {
            // A helper catches what its tasks throw.
            drop(helper.join());
        }
    }
}

impl Shared {
    /// A helper's life.
    fn help(&self, index: usize) {
        let mut seen = 0;
        loop {
            let mut entered = false;
            let mut is_called = || {
                entered = self.gate.enter(&mut seen);
                entered || self.stop.load(Acquire)
            };
            if !self.watch(&mut is_called) {
                self.sleep(&mut is_called);
            }
            if !entered {
                return;
            }
            // SAFETY: inside the gate it is only read.
            let work = unsafe { *self.work.get() };
            if let Some(work) = work
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take_tasks(work, index)))
            {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.gate.0.fetch_sub(1, Release);
        }
    }

    /// Does the tasks of the thread's own part, then those that are left of the others'.
    fn take_tasks(&self, work: Work, index: usize) {
        // SAFETY: the caller of `run` keeps it until nobody is inside.
        let task = unsafe { &*work.task };
        let parts = self.taken.len();
        for part in (index..parts).chain(0..index) {
            let [start, end] = [part, part + 1].map(|part| work.tasks * part / parts);
            loop {
                let at = start + self.taken[part].0.fetch_add(1, Relaxed);
                if at >= end {
                    break;
                }
                task(at);
            }
        }
    }

    /// Waits awake until `is_over`, but not for long; whether it is.
    fn watch(&self, is_over: &mut impl FnMut() -> bool) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..32 {
                if is_over() {
                    return true;
                }
                hint::spin_loop();
            }
            if !self.spin || start.elapsed() > AWAKE {
                return false;
            }
        }
    }

    /// Waits until `is_over`, which takes no longer than a task.
    fn wait(&self, mut is_over: impl FnMut() -> bool) {
        while !self.watch(&mut is_over) {
            thread::yield_now();
        }
    }

    /// Waits asleep until `is_over`.
    fn sleep(&self, is_over: &mut impl FnMut() -> bool) {
        let mut door = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.fetch_add(1, Relaxed);
        // Either this thread sees that the gate is open, or who opened it sees this thread asleep.
        fence(SeqCst);
        while !is_over() {
            door = self.opened.wait(door).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Relaxed);
    }

    /// Wakes those who sleep.
    fn wake(&self) {
        fence(SeqCst);
        if self.asleep.load(Relaxed) > 0 {
            drop(self.door.lock().unwrap_or_else(PoisonError::into_inner));
            self.opened.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pool: &Pool, tasks: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, |task| {
            counts[task].fetch_add(1, Relaxed);
        });
        counts.iter().map(|count| count.load(Relaxed)).collect()
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for round in 0..2000 {
                let tasks = round % 37;
                assert_eq!(counts(&pool, tasks), vec![1; tasks], "{threads} threads");
            }
            // Helpers that have gone to sleep come back.
            thread::sleep(AWAKE * 20);
            assert_eq!(counts(&pool, 100), vec![1; 100], "{threads} threads, after a while");
        }
    }

    #[test]
    fn helpers_help() {
        let pool = Pool::new(2).unwrap();
        let (met, meeting) = (AtomicUsize::new(0), Instant::now());
        // Neither task ends before the other has begun.
        pool.run(2, |_| {
            met.fetch_add(1, SeqCst);
            while met.load(SeqCst) < 2 {
                assert!(meeting.elapsed() < Duration::from_secs(60), "nobody came");
                thread::yield_now();
            }
        });
    }

    #[test]
    fn work_within_work_and_of_several_callers() {
        let pool = Pool::new(3).unwrap();
        let done = AtomicUsize::new(0);
        let add = |times: usize| {
            pool.run(times, |_| {
                pool.run(5, |_| {
                    done.fetch_add(1, Relaxed);
                });
            });
        };
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|_| add(7)));
            }
        });
        assert_eq!(done.load(Relaxed), 4 * 200 * 7 * 5);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3).unwrap();
        for bad in [0, 31, 63] {
            let run = || pool.run(64, |task| assert_ne!(task, bad, "task {task} fails"));
            let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            let text = panic.downcast_ref::<String>().unwrap();
            assert!(text.contains(&format!("task {bad} fails")), "{text}");
            assert_eq!(counts(&pool, 50), vec![1; 50]);
        }
    }
}
