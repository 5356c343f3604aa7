//! A TCP connection that can be cut or held up: tests put one between a program and what it connects to.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// Forwards connections to an address until it is cut or held up, and again when it was mended.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    passage: Passage,
    delay: Duration,
    connections: u64,
    open: HashMap<u64, Vec<TcpStream>>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Passage {
    #[default]
    Open,
    Held,
    Cut,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, passage: Passage) -> MutexGuard<'_, State> {
        let mut state = self.state();
        state.passage = passage;
        self.changed.notify_all();
        state
    }

    /// Waits for as long as the link is held up.
    fn passing(&self) -> MutexGuard<'_, State> {
        let held = |state: &mut State| state.passage == Passage::Held;
        self.changed.wait_while(self.state(), held).unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    /// A link to an address.
    ///
    /// # Panics
    ///
    /// When no port is free.
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it listens");
        let shared = Arc::<Shared>::default();
        let link = Self { address, shared: Arc::clone(&shared) };
        // It ends with the test's process.
        thread::spawn(move || {
            for near in listener.incoming().filter_map(Result::ok) {
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.connect(near, target));
            }
        });
        link
    }

    /// Where to connect instead.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections; new ones are closed at once.
    pub fn cut(&self) {
        let mut state = self.shared.set(Passage::Cut);
        for stream in state.open.drain().flat_map(|(_, streams)| streams) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Lets nothing through and closes nothing, as a network does that drops every packet. What was sent
    /// arrives, late, when it is mended.
    pub fn hold(&self) {
        drop(self.shared.set(Passage::Held));
    }

    /// Lets everything through so much later, either way.
    pub fn delay(&self, delay: Duration) {
        self.shared.state().delay = delay;
    }

    /// Lets everything through again, at once.
    pub fn mend(&self) {
        self.shared.set(Passage::Open).delay = Duration::ZERO;
    }
}

impl Shared {
    /// Forwards one connection until it ends.
    fn connect(self: &Arc<Self>, near: TcpStream, target: SocketAddr) {
        let number = {
            let mut state = self.state();
            state.connections += 1;
            let number = state.connections;
            // A connection that waits for the link can be cut as well.
            state.open.insert(number, near.try_clone().into_iter().collect());
            number
        };
        let _ = self.forward(number, &near, target);
        let _ = near.shutdown(Shutdown::Both);
        self.state().open.remove(&number);
    }

    fn forward(self: &Arc<Self>, number: u64, near: &TcpStream, target: SocketAddr) -> io::Result<()> {
        if self.passing().passage == Passage::Cut {
            return Ok(());
        }
        let far = TcpStream::connect(target)?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let (near_again, far_again) = (near.try_clone()?, far.try_clone()?);
        match self.state().open.get_mut(&number) {
            Some(streams) => streams.push(far.try_clone()?),
            None => return Ok(()),
        }
        let shared = Arc::clone(self);
        let back = thread::spawn(move || shared.pump(far_again, near_again));
        self.pump(near.try_clone()?, far);
        let _ = back.join();
        Ok(())
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let delay = self.passing().delay;
            thread::sleep(delay);
            if to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        drop(self.passing());
        // Who is told that nothing more comes may still have something to say.
        let _ = to.shutdown(Shutdown::Write);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A connection through a link, both ends of it.
    fn pair() -> (Link, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = Link::to(listener.local_addr().unwrap());
        let near = TcpStream::connect(link.address()).unwrap();
        let (far, _) = listener.accept().unwrap();
        (link, near, far)
    }

    fn read(from: &mut TcpStream, limit: Duration) -> io::Result<Vec<u8>> {
        from.set_read_timeout(Some(limit)).unwrap();
        let mut buffer = [0; 16];
        let length = from.read(&mut buffer)?;
        Ok(buffer[..length].to_vec())
    }

    #[test]
    fn a_cut_ends_connections() {
        let (link, mut near, mut far) = pair();
        near.write_all(b"one").unwrap();
        assert_eq!(read(&mut far, Duration::from_secs(10)).unwrap(), b"one");
        link.cut();
        assert_eq!(read(&mut near, Duration::from_secs(10)).unwrap_or_default(), b"");
        assert_eq!(read(&mut far, Duration::from_secs(10)).unwrap_or_default(), b"");
        let mut refused = TcpStream::connect(link.address()).unwrap();
        assert_eq!(read(&mut refused, Duration::from_secs(10)).unwrap_or_default(), b"");
    }

    #[test]
    fn what_is_held_up_arrives_late() {
        let (link, mut near, mut far) = pair();
        link.hold();
        near.write_all(b"one").unwrap();
        let waited = read(&mut far, Duration::from_millis(200)).unwrap_err();
        assert!(matches!(waited.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{waited}");
        link.mend();
        assert_eq!(read(&mut far, Duration::from_secs(10)).unwrap(), b"one");
        // A connection that is held up can be cut.
        link.hold();
        near.write_all(b"two").unwrap();
        link.cut();
        assert_ne!(read(&mut far, Duration::from_secs(10)).unwrap_or_default(), b"two");
    }
}
