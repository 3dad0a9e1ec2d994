//! Numbers of sets and of backends, which no other has while flows may know it.
//!
//! Pure. Numbers rise and start over at the end, past those in use. What has
//! been given is remembered by a mark, kept with the tables and raised before a
//! number beyond it is given: an agent that starts anew does not give a number
//! again that it gave, and took back, just before.

use std::collections::HashSet;

/// How far ahead of use the mark is set.
const AHEAD: u32 = 4096;

/// All numbers are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all {0} numbers are in use")]
pub struct Exhausted(pub u32);

#[derive(Clone, Debug)]
pub struct Ids {
    /// The last one given.
    last: u32,
    limit: u32,
    used: HashSet<u32>,
    /// Those up to here may have been given.
    mark: u32,
}

impl Ids {
    /// Numbers are 1 to `limit`.
    pub fn new(limit: u32) -> Self {
        Self { last: 0, limit, used: HashSet::new(), mark: 0 }
    }

    /// Take up from an earlier run: its mark, and what is in use.
    pub fn resume(&mut self, mark: u32, used: impl Iterator<Item = u32>) {
        self.used.extend(used.filter(|id| *id != 0));
        // Without a mark that can be believed, those in use tell the least.
        let highest = self.used.iter().copied().max().unwrap_or_default();
        self.last = mark.max(highest).min(self.limit);
        self.mark = self.last;
    }

    pub fn give(&mut self) -> Result<u32, Exhausted> {
        if self.used.len() >= usize::try_from(self.limit).unwrap_or(usize::MAX) {
            return Err(Exhausted(self.limit));
        }
        loop {
            self.last = if self.last >= self.limit { 1 } else { self.last + 1 };
            if self.used.insert(self.last) {
                return Ok(self.last);
            }
        }
    }

    pub fn take_back(&mut self, id: u32) {
        self.used.remove(&id);
    }

    /// The mark to write before anything given since, if the last one written
    /// does not cover it.
    pub fn mark_to_write(&self) -> Option<u32> {
        // After starting over the mark is below what it was.
        let covered = self.last <= self.mark && self.mark - self.last <= AHEAD;
        let mark = self.last.saturating_add(AHEAD).min(self.limit);
        (!covered && mark != self.mark).then_some(mark)
    }

    pub fn marked(&mut self, mark: u32) {
        self.mark = mark;
    }

    pub fn in_use(&self) -> usize {
        self.used.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_not_given_again_soon_nor_while_in_use() {
        let mut ids = Ids::new(5);
        let all: Vec<u32> = (0..5).map(|_| ids.give().unwrap()).collect();
        assert_eq!(all, [1, 2, 3, 4, 5]);
        assert_eq!(ids.give(), Err(Exhausted(5)));
        ids.take_back(2);
        assert_eq!(ids.give(), Ok(2));
        ids.take_back(5);
        ids.take_back(1);
        assert_eq!(ids.give(), Ok(5), "the one after 2 that is free");
        assert_eq!(ids.give(), Ok(1));
    }

    #[test]
    fn a_new_run_gives_none_of_the_last_runs_numbers() {
        let mut before = Ids::new(u32::MAX);
        let mut mark = 0;
        for _ in 0..10_000 {
            let id = before.give().unwrap();
            if let Some(new) = before.mark_to_write() {
                mark = new;
                before.marked(new);
            }
            assert!(id <= mark);
            before.take_back(id);
        }
        let mut after = Ids::new(u32::MAX);
        after.resume(mark, [7].into_iter());
        assert!(after.give().unwrap() > 10_000);
        assert!(after.mark_to_write().is_some());
    }

    #[test]
    fn numbers_start_over_past_those_in_use() {
        let mut ids = Ids::new(u32::MAX);
        ids.resume(u32::MAX - 1, [1, 2].into_iter());
        assert_eq!(ids.give(), Ok(u32::MAX));
        assert_eq!(ids.give(), Ok(3));
        assert_eq!(ids.mark_to_write(), Some(3 + AHEAD));
    }
}
