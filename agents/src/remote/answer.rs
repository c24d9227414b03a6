use futures::StreamExt;
use sarai_core::request::Delta;

use super::api::Deltas;
use super::body::Lines;
use crate::Error;

/// An answer on its way, as a protocol words it.
pub(crate) trait Answer: Sized + Send + 'static {
    /// The next piece, or the end.
    fn next(&mut self) -> impl Future<Output = Result<Delta, Error>> + Send;

    /// The lines that it is read from.
    fn lines(&mut self) -> &mut Lines;

    /// Its pieces. After the end the lines are read to theirs, so that the connection can be used again.
    fn deltas(self) -> Deltas {
        futures::stream::unfold(Some(self), |answer| async {
            let mut answer = answer?;
            match answer.next().await {
                Ok(Delta::Text(text)) => Some((Ok(Delta::Text(text)), Some(answer))),
                Ok(end) => {
                    answer.lines().drain().await;
                    Some((Ok(end), None))
                }
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }
}
