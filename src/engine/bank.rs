//! Which rows of the device's vector bank hold which vectors: by identity, counted by reference.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// Vectors, and the first of the bank's rows that hold them.
pub type InBank = (Arc<[f32]>, u32);

/// Rows of the bank.
#[derive(Debug)]
pub struct Bank {
    /// Runs of free rows: the first of each, and how many. No two touch.
    free: BTreeMap<u32, u32>,
    /// By address, which the `Arc` keeps valid, and number of rows.
    rows: HashMap<(usize, u32), Entry>,
}

#[derive(Debug)]
struct Entry {
    first: u32,
    references: usize,
    vector: Arc<[f32]>,
}

impl Bank {
    /// All rows free.
    pub fn new(rows: usize) -> Self {
        Self { free: BTreeMap::from([(0, rows as u32)]), rows: HashMap::new() }
    }

    /// The first of `rows` rows of a vector that follow each other, and whether it must be uploaded;
    /// `None` where there is no room.
    pub fn take(&mut self, vector: &Arc<[f32]>, rows: usize) -> Option<(u32, bool)> {
        let rows = rows as u32;
        let key = (vector.as_ptr() as usize, rows);
        if let Some(entry) = self.rows.get_mut(&key) {
            entry.references += 1;
            return Some((entry.first, false));
        }
        let (&first, &len) = self.free.iter().find(|(_, len)| **len >= rows)?;
        self.free.remove(&first);
        if len > rows {
            self.free.insert(first + rows, len - rows);
        }
        self.rows.insert(key, Entry { first, references: 1, vector: Arc::clone(vector) });
        Some((first, true))
    }

    /// Gives a vector's rows back once.
    pub fn release(&mut self, vector: &Arc<[f32]>, rows: usize) {
        let key = (vector.as_ptr() as usize, rows as u32);
        let entry = self.rows.get_mut(&key).expect("released as often as taken");
        debug_assert!(Arc::ptr_eq(&entry.vector, vector));
        entry.references -= 1;
        if entry.references > 0 {
            return;
        }
        let (mut first, mut len) = (entry.first, rows as u32);
        self.rows.remove(&key);
        if let Some(after) = self.free.remove(&(first + len)) {
            len += after;
        }
        if let Some((&before, &more)) = self.free.range(..first).next_back()
            && before + more == first
        {
            (first, len) = (before, more + len);
        }
        self.free.insert(first, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector() -> Arc<[f32]> {
        Arc::from([0.0])
    }

    #[test]
    fn rows_that_follow_each_other_are_found_again() {
        let mut bank = Bank::new(8);
        let [a, b, c] = [vector(), vector(), vector()];
        assert_eq!(bank.take(&a, 3), Some((0, true)));
        assert_eq!(bank.take(&b, 1), Some((3, true)));
        assert_eq!(bank.take(&a, 3), Some((0, false)), "held already");
        assert_eq!(bank.take(&c, 5), None, "four are left");
        assert_eq!(bank.take(&c, 4), Some((4, true)));
        assert_eq!(bank.take(&b, 5), None, "the same numbers as other rows");
        bank.release(&a, 3);
        let d = vector();
        assert_eq!(bank.take(&d, 1), None, "a is still used");
        bank.release(&a, 3);
        bank.release(&c, 4);
        assert_eq!(bank.take(&d, 4), Some((4, true)), "three and four rows do not touch");
        bank.release(&d, 4);
        bank.release(&b, 1);
        assert_eq!(bank.take(&d, 8), Some((0, true)), "all are one run again");
    }
}
