//! Which of a sequence's tokens stand in for images and audio, and at which positions all of them stand.

use std::sync::Arc;

use super::super::multimodal::Embedded;

/// The images and audio of a sequence, by their places in its list of tokens. Empty for text alone, where a token's position is
/// its place.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Layout(Vec<Placed>);

#[derive(Clone, Debug)]
struct Placed {
    /// The place of its first stand-in.
    start: usize,
    embedded: Arc<Embedded>,
}

/// What comes next in a sequence.
#[derive(Debug)]
pub(in super::super) enum Next<'l> {
    /// Tokens, up to this place.
    Tokens(usize),
    /// These embeddings, of which the first `done` are computed.
    Embedded { embedded: &'l Arc<Embedded>, done: usize },
}

impl Layout {
    /// Has the tokens from `start` on stand in for `embedded`. Called in the tokens' order.
    pub(in super::super) fn place(&mut self, start: usize, embedded: &Arc<Embedded>) {
        self.0.push(Placed { start, embedded: Arc::clone(embedded) });
    }

    /// The position of the token at this place. In a grid, where all have one time, it is the grid's.
    pub(in super::super) fn position(&self, at: usize) -> usize {
        let mut saved = 0;
        for Placed { start, embedded } in &self.0 {
            if at < start + embedded.len() {
                let inside = at.saturating_sub(*start);
                let is_grid = embedded.positions() < embedded.len();
                return at - saved - if is_grid { inside } else { 0 };
            }
            saved += embedded.len() - embedded.positions();
        }
        at - saved
    }

    /// The last place up to this one at which a sequence can be gone on with: no image or audio is cut.
    pub(super) fn whole(&self, at: usize) -> usize {
        let inside =
            |placed: &&Placed| (placed.start + 1..placed.start + placed.embedded.len()).contains(&at);
        self.0.iter().find(inside).map_or(at, |placed| placed.start)
    }

    /// What comes next where so many are computed.
    pub(in super::super) fn next(&self, computed: usize) -> Next<'_> {
        for Placed { start, embedded } in &self.0 {
            if computed < *start {
                return Next::Tokens(*start);
            }
            if computed < start + embedded.len() {
                return Next::Embedded { embedded, done: computed - start };
            }
        }
        Next::Tokens(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::multimodal::tests::embedded;
    use super::*;

    /// Two tokens, an image of 2 × 3, two tokens, audio of 4, and text.
    fn layout() -> Layout {
        let mut layout = Layout::default();
        layout.place(2, &embedded(6, Some(3), 1));
        layout.place(10, &embedded(4, None, 2));
        layout
    }

    #[test]
    fn an_image_takes_fewer_positions_than_places() {
        let positions: Vec<usize> = (0..16).map(|at| layout().position(at)).collect();
        assert_eq!(positions, [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(Layout::default().position(7), 7);
    }

    #[test]
    fn no_image_is_gone_on_with_from_its_middle() {
        let whole: Vec<usize> = (0..16).map(|at| layout().whole(at)).collect();
        assert_eq!(whole, [0, 1, 2, 2, 2, 2, 2, 2, 8, 9, 10, 10, 10, 10, 14, 15]);
    }

    #[test]
    fn text_comes_up_to_an_image_and_then_the_image() {
        let layout = layout();
        let next = |computed| match layout.next(computed) {
            Next::Tokens(until) => (until, None),
            Next::Embedded { embedded, done } => (embedded.len(), Some(done)),
        };
        assert_eq!((next(0), next(1)), ((2, None), (2, None)));
        assert_eq!((next(2), next(7), next(8)), ((6, Some(0)), (6, Some(5)), (10, None)));
        assert_eq!((next(13), next(14)), ((4, Some(3)), (usize::MAX, None)));
        assert_eq!(Layout::default().next(3).tokens(), usize::MAX);
    }

    impl Next<'_> {
        fn tokens(&self) -> usize {
            match self {
                Self::Tokens(until) => *until,
                Self::Embedded { .. } => 0,
            }
        }
    }
}
