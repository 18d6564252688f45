//! Bookkeeping of cache pages: which are free, and how many hold each. No device.

/// Pages, each of one layer, counted by reference.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<u32>,
    references: Vec<u32>,
}

impl PagePool {
    /// All free.
    pub fn new(pages: usize) -> Self {
        Self { free: (0..pages as u32).rev().collect(), references: vec![0; pages] }
    }

    /// Free pages.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Takes a free page, held once. The caller has checked `available`.
    pub fn take(&mut self) -> u32 {
        let page = self.free.pop().expect("the caller has checked that a page is free");
        self.references[page as usize] = 1;
        page
    }

    /// Whether releasing it once would free it.
    pub fn is_held_once(&self, page: u32) -> bool {
        self.references[page as usize] == 1
    }

    /// Holds a page once more.
    pub fn retain(&mut self, page: u32) {
        assert!(self.references[page as usize] > 0, "page {page} is free");
        self.references[page as usize] += 1;
    }

    /// Holds a page once less; the last one frees it.
    pub fn release(&mut self, page: u32) {
        let references = &mut self.references[page as usize];
        assert!(*references > 0, "page {page} is free");
        *references -= 1;
        if *references == 0 {
            self.free.push(page);
        }
    }
}

/// The pages of a sequence: `layers[l][b]` holds block b of positions at layer l.
#[derive(Clone, Debug, Default)]
pub struct PageTable {
    /// One list a layer.
    pub layers: Vec<Vec<u32>>,
}

impl PageTable {
    /// `blocks` new pages at each of `layers` layers.
    pub fn take(pool: &mut PagePool, layers: usize, blocks: usize) -> Self {
        let list = |_| (0..blocks).map(|_| pool.take()).collect();
        Self { layers: (0..layers).map(list).collect() }
    }

    /// A table of `blocks` blocks that shares the first `shared(layer)` blocks of `from` and has
    /// its own pages beyond. Where `from` holds a block that is only partly shared
    /// (`copied(layer)`), the pair to be copied is returned.
    pub fn fork(
        from: &Self,
        pool: &mut PagePool,
        blocks: usize,
        shared: impl Fn(usize) -> (usize, bool),
    ) -> (Self, Vec<[u32; 2]>) {
        let mut copies = Vec::new();
        let layers = from.layers.iter().enumerate().map(|(layer, pages)| {
            let (whole, partial) = shared(layer);
            let mut list = pages[..whole].to_vec();
            list.iter().for_each(|&page| pool.retain(page));
            list.extend((whole..blocks).map(|_| pool.take()));
            if partial {
                copies.push([pages[whole], list[whole]]);
            }
            list
        });
        let layers = layers.collect();
        (Self { layers }, copies)
    }

    /// Gives all pages back, the last first: the next sequence has them in the order of memory again.
    pub fn release(self, pool: &mut PagePool) {
        self.layers.iter().flatten().rev().for_each(|&page| pool.release(page));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_share_whole_blocks_and_copy_partial_ones() {
        let mut pool = PagePool::new(20);
        let base = PageTable::take(&mut pool, 2, 3);
        let (fork, copies) =
            PageTable::fork(
                &base,
                &mut pool,
                4,
                |layer| if layer == 0 { (2, true) } else { (1, false) },
            );
        assert_eq!(fork.layers[0][..2], base.layers[0][..2]);
        assert_eq!(fork.layers[1][..1], base.layers[1][..1]);
        assert_eq!(copies, vec![[base.layers[0][2], fork.layers[0][2]]]);
        assert_eq!(pool.available(), 20 - 6 - (2 + 3));
        base.release(&mut pool);
        assert_eq!(pool.available(), 20 - 8);
        fork.release(&mut pool);
        assert_eq!(pool.available(), 20);
    }
}
