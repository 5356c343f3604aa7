//! Ports that stay a test's own while nobody listens on them.
//!
//! A port that was free a moment ago may be given to somebody else by the system: to a server of another
//! test, which would then answer in the place of one that should be down. A port that is kept is bound by a
//! socket that does not listen, so that the system gives it to nobody who asks for any port and connections
//! to it are refused, while whoever asks for just this port may bind it as well and listen.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
};

use tokio::net::TcpSocket;

/// A port of loopback, kept until this is dropped.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    // Bound, and never listened on.
    _socket: TcpSocket,
}

impl Port {
    /// Keeps a free one.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn keep() -> Self {
        let keep = || -> io::Result<Self> {
            let socket = TcpSocket::new_v4()?;
            // What lets others bind it too. Servers set it as well, so as to start again at once.
            socket.set_reuseaddr(true)?;
            socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
            Ok(Self { address: socket.local_addr()?, _socket: socket })
        };
        keep().expect("a port of loopback is free")
    }

    /// Where whoever listens on it is reached.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.address.port()
    }

    /// Listens on it.
    ///
    /// # Panics
    ///
    /// When somebody else does.
    pub fn listen(&self) -> TcpListener {
        TcpListener::bind(self.address).expect("the port is kept for this")
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn a_kept_port_is_nobody_elses() {
        let port = Port::keep();
        for _ in 0..2 {
            let refused = TcpStream::connect(port.address()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            let listener = port.listen();
            let near = TcpStream::connect(port.address()).unwrap();
            // The connection that its server ends is the one that lingers.
            drop(listener.accept().unwrap());
            drop((listener, near));
        }
        let others: Vec<_> =
            (0..2_000).filter_map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()).collect();
        assert!(others.iter().all(|other| other.local_addr().unwrap() != port.address()));
    }
}
