//! Large bodies in parts, so that they fit into a NATS server's messages and nobody is overrun.

use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};

use crate::wire::Frame;

/// Bytes of one frame. A stock NATS server takes messages of 1 MiB.
pub const FRAME_BYTES: usize = 256 * 1024;
/// Frames that may be under way before the receiver has said anything.
pub const WINDOW: u32 = 4;

/// The parts of a body, in order. A body that fits into one message has no hash: the connection sees
/// to it that a message is whole.
pub fn split(body: &Bytes) -> impl Iterator<Item = (Frame, Bytes)> + Send + use<> {
    let (body, total) = (body.clone(), body.len());
    let count = total.div_ceil(FRAME_BYTES).max(1);
    let hash = (count > 1).then(|| hex::encode(Sha256::digest(&body)));
    (0..count).map(move |at| {
        let part = body.slice(at * FRAME_BYTES..total.min((at + 1) * FRAME_BYTES));
        let sha256 = hash.clone().filter(|_| at + 1 == count);
        (Frame { number: u32::try_from(at).unwrap_or(u32::MAX), total, sha256 }, part)
    })
}

/// Whether a body goes in one message.
pub fn is_single(body: &Bytes) -> bool {
    body.len() <= FRAME_BYTES
}

/// Puts a body together again.
#[derive(Debug, Default)]
pub struct Assembly {
    parts: BytesMut,
    next: u32,
}

/// What came of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Assembled {
    /// More are to come. (The frame may have been one that was here before.)
    Partly,
    /// This is all of it.
    Whole(Bytes),
    /// A frame is missing, or they do not fit together: the body has to be sent again.
    Broken,
    /// It is larger than it may be.
    TooLarge,
}

impl Assembly {
    /// Takes in the next frame of a body of at most `limit` bytes. A first frame begins anew.
    pub fn take(&mut self, frame: &Frame, part: Bytes, limit: usize) -> Assembled {
        if frame.total > limit {
            return Assembled::TooLarge;
        }
        if frame.number == 0 {
            if part.len() == frame.total {
                return Assembled::Whole(part);
            }
            self.parts.clear();
            self.next = 0;
        }
        if frame.number < self.next {
            return Assembled::Partly;
        }
        if frame.number > self.next || self.parts.len() + part.len() > frame.total {
            return Assembled::Broken;
        }
        self.parts.extend_from_slice(&part);
        self.next += 1;
        if self.parts.len() < frame.total {
            return if frame.sha256.is_some() { Assembled::Broken } else { Assembled::Partly };
        }
        let whole = std::mem::take(&mut self.parts).freeze();
        self.next = 0;
        match &frame.sha256 {
            Some(hash) if *hash == hex::encode(Sha256::digest(&whole)) => Assembled::Whole(whole),
            _ => Assembled::Broken,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(length: usize) -> Bytes {
        (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect::<Vec<_>>().into()
    }

    #[test]
    fn bodies_of_every_size_arrive() {
        for length in
            [0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES, 3 * FRAME_BYTES + 7]
        {
            let sent = body(length);
            let mut assembly = Assembly::default();
            let frames: Vec<_> = split(&sent).collect();
            assert_eq!(frames.len() == 1, is_single(&sent), "{length}");
            for (at, (frame, part)) in frames.iter().enumerate() {
                let assembled = assembly.take(frame, part.clone(), length);
                if at + 1 == frames.len() {
                    assert_eq!(assembled, Assembled::Whole(sent.clone()), "{length}");
                } else {
                    assert_eq!(assembled, Assembled::Partly);
                    assert_eq!(assembly.take(frame, part.clone(), length), Assembled::Partly, "twice");
                }
            }
        }
    }

    #[test]
    fn what_is_lost_or_changed_is_noticed_and_can_be_sent_again() {
        let sent = body(3 * FRAME_BYTES + 7);
        let frames: Vec<_> = split(&sent).collect();
        let mut assembly = Assembly::default();
        assert_eq!(assembly.take(&frames[0].0, frames[0].1.clone(), usize::MAX), Assembled::Partly);
        assert_eq!(assembly.take(&frames[2].0, frames[2].1.clone(), usize::MAX), Assembled::Broken);
        let mut last = Assembled::Partly;
        for (frame, part) in &frames {
            last = assembly.take(frame, part.clone(), usize::MAX);
        }
        assert_eq!(last, Assembled::Whole(sent.clone()));
        let mut last = Assembled::Partly;
        for (at, (frame, part)) in frames.iter().enumerate() {
            let part = if at == 1 { body(part.len() + 1).slice(1..) } else { part.clone() };
            last = assembly.take(frame, part, usize::MAX);
        }
        assert_eq!(last, Assembled::Broken);
        assert_eq!(assembly.take(&frames[0].0, frames[0].1.clone(), sent.len() - 1), Assembled::TooLarge);
        // A total that shrinks on the way must not make the buffer larger than it.
        let liar = Frame { number: 1, total: 10, sha256: None };
        assert_eq!(assembly.take(&frames[0].0, frames[0].1.clone(), usize::MAX), Assembled::Partly);
        assert_eq!(assembly.take(&liar, frames[1].1.clone(), usize::MAX), Assembled::Broken);
    }
}
