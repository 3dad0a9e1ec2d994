//! The answering side: one TCP and one UDP port, one thread each, which do what
//! the first byte asks for. Everything blocks; nobody polls.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::{SERVER_CORE, cpu, in_namespace, join};

/// Where every server listens.
pub const PORT: u16 = 7007;

/// Everything that comes is sent back.
pub const ECHO: u8 = 1;
/// Everything that comes is counted and thrown away.
pub const SINK: u8 = 2;
/// One byte back, and the server ends the connection: the client, which opens
/// thousands a second, is not left with ports that wait.
pub const ONCE: u8 = 3;

/// How long a thread may take to see that it is to end.
const PATIENCE: i64 = 200;

/// What the server has seen.
#[derive(Debug, Default)]
pub struct Seen {
    pub connections: AtomicU64,
    /// Datagrams that were sent back.
    pub echoed: AtomicU64,
    /// Bytes of streams, and datagrams, that were thrown away.
    pub bytes: AtomicU64,
    pub packets: AtomicU64,
}

impl Seen {
    fn count(of: &AtomicU64, n: u64) {
        of.fetch_add(n, Ordering::Relaxed);
    }
}

type Body = Box<dyn FnOnce(&AtomicBool, &Seen) -> io::Result<()> + Send>;

/// Listens inside one namespace until it is dropped.
pub struct Server {
    pub seen: Arc<Seen>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    ids: Vec<i32>,
}

impl Server {
    pub fn start(namespace: &Path, address: IpAddr) -> io::Result<Self> {
        let open = in_namespace(namespace, None, move || {
            let at = SocketAddr::new(address, PORT);
            Ok((TcpListener::bind(at)?, UdpSocket::bind(at)?))
        });
        let (listener, socket) = join(open)?;
        // What is accepted inherits both.
        setsockopt(&listener, sockopt::ReceiveTimeout, &TimeVal::milliseconds(PATIENCE))?;
        setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
        socket.set_read_timeout(Some(Duration::from_millis(PATIENCE as u64)))?;
        let mut server = Self { seen: Arc::default(), stop: Arc::default(), threads: Vec::new(), ids: Vec::new() };
        server.run(namespace, Box::new(move |stop, seen| accept(&listener, stop, seen)))?;
        server.run(namespace, Box::new(move |stop, seen| datagrams(&socket, stop, seen)))?;
        Ok(server)
    }

    fn run(&mut self, namespace: &Path, body: Body) -> io::Result<()> {
        let (stop, seen) = (self.stop.clone(), self.seen.clone());
        let (tell, told) = std::sync::mpsc::channel();
        self.threads.push(in_namespace(namespace, Some(SERVER_CORE), move || {
            let _ = tell.send(nix::unistd::gettid().as_raw());
            body(&stop, &seen)
        }));
        self.ids.push(told.recv().map_err(|_| io::Error::other("the server's thread did not start"))?);
        Ok(())
    }

    /// What its threads have used of the processors.
    pub fn cpu(&self) -> Duration {
        self.ids.iter().map(|id| cpu::of_thread(*id)).sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn timed_out(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn accept(listener: &TcpListener, stop: &AtomicBool, seen: &Seen) -> io::Result<()> {
    let mut buffer = vec![0u8; 1 << 18];
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                Seen::count(&seen.connections, 1);
                // A client that resets ends its own connection only.
                let _ = serve(stream, stop, seen, &mut buffer);
            }
            Err(e) if timed_out(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn serve(mut stream: TcpStream, stop: &AtomicBool, seen: &Seen, buffer: &mut [u8]) -> io::Result<()> {
    let mut what = [0u8; 1];
    stream.read_exact(&mut what)?;
    if what[0] == ONCE {
        return stream.write_all(&what);
    }
    if what[0] == ECHO {
        stream.write_all(&what)?;
    }
    while !stop.load(Ordering::Relaxed) {
        match stream.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(n) if what[0] == SINK => Seen::count(&seen.bytes, n as u64),
            Ok(n) => stream.write_all(&buffer[..n])?,
            Err(e) if timed_out(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn datagrams(socket: &UdpSocket, stop: &AtomicBool, seen: &Seen) -> io::Result<()> {
    let mut buffer = [0u8; 2048];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv_from(&mut buffer) {
            Ok((n, _)) if n > 0 && buffer[0] == SINK => Seen::count(&seen.packets, 1),
            Ok((n, from)) => {
                Seen::count(&seen.echoed, 1);
                let _ = socket.send_to(&buffer[..n], from);
            }
            Err(e) if timed_out(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
