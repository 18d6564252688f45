//! Which rows of the device's vector bank hold which vectors: by identity, counted by reference.

use std::{collections::HashMap, sync::Arc};

/// Rows of the bank.
#[derive(Debug)]
pub struct Bank {
    free: Vec<u32>,
    /// By address; the `Arc` keeps it valid.
    rows: HashMap<usize, Entry>,
}

#[derive(Debug)]
struct Entry {
    row: u32,
    references: usize,
    vector: Arc<[f32]>,
}

impl Bank {
    /// All rows free.
    pub fn new(rows: usize) -> Self {
        Self { free: (0..rows as u32).rev().collect(), rows: HashMap::new() }
    }

    /// Free rows.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// The row of a vector, and whether it must be uploaded. The caller has checked `available`.
    pub fn take(&mut self, vector: &Arc<[f32]>) -> (u32, bool) {
        let key = vector.as_ptr() as usize;
        if let Some(entry) = self.rows.get_mut(&key) {
            entry.references += 1;
            return (entry.row, false);
        }
        let row = self.free.pop().expect("the caller has checked that a row is free");
        self.rows.insert(key, Entry { row, references: 1, vector: Arc::clone(vector) });
        (row, true)
    }

    /// Gives a vector's row back once.
    pub fn release(&mut self, vector: &Arc<[f32]>) {
        let key = vector.as_ptr() as usize;
        let entry = self.rows.get_mut(&key).expect("released as often as taken");
        debug_assert!(Arc::ptr_eq(&entry.vector, vector));
        entry.references -= 1;
        if entry.references == 0 {
            self.free.push(entry.row);
            self.rows.remove(&key);
        }
    }
}
