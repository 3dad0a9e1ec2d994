//! Traffic between two namespaces: request-response, packets, bytes.
//!
//! Plain blocking sockets on threads that entered their namespace once; the
//! client on one core and the server on another, the same for every subject.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::Pid;

const CLIENT_CORE: usize = 0;
const SERVER_CORE: usize = 1;
const ECHO_PORT: u16 = 7007;
const SINK_PORT: u16 = 7009;
const READ_TIMEOUT: Duration = Duration::from_millis(200);

/// A client's namespace and the server it talks to.
#[derive(Clone, Debug)]
pub struct Pair {
    pub subject: String,
    pub client: PathBuf,
    pub server: PathBuf,
    pub address: IpAddr,
}

/// Run `f` on a thread of its own inside the namespace at `path`.
pub fn in_namespace<R: Send + 'static>(
    path: &Path,
    core: Option<usize>,
    f: impl FnOnce() -> io::Result<R> + Send + 'static,
) -> JoinHandle<io::Result<R>> {
    let path = path.to_owned();
    std::thread::spawn(move || {
        setns(File::open(&path)?, CloneFlags::CLONE_NEWNET)?;
        if let Some(core) = core {
            let mut set = CpuSet::new();
            set.set(core)?;
            // On a machine with one core everything shares it.
            let _ = sched_setaffinity(Pid::from_raw(0), &set);
        }
        f()
    })
}

fn join<R>(thread: JoinHandle<io::Result<R>>) -> io::Result<R> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the traffic thread panicked")))
}

type Body = Box<dyn FnOnce(&AtomicBool) -> io::Result<()> + Send>;

/// The answering side, inside one namespace, until dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    /// Bytes and packets the sinks have taken.
    sunk: Arc<AtomicU64>,
    packets: Arc<AtomicU64>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Server {
    pub fn start(namespace: &Path, address: IpAddr) -> io::Result<Self> {
        let open = in_namespace(namespace, None, move || {
            let echo = SocketAddr::new(address, ECHO_PORT);
            let sink = SocketAddr::new(address, SINK_PORT);
            Ok((TcpListener::bind(echo)?, UdpSocket::bind(echo)?, TcpListener::bind(sink)?, UdpSocket::bind(sink)?))
        });
        let (tcp_echo, udp_echo, tcp_sink, udp_sink) = join(open)?;
        let stop = Arc::new(AtomicBool::new(false));
        let sunk = Arc::new(AtomicU64::new(0));
        let packets = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        let mut run = |f: Body| {
            let stop = stop.clone();
            threads.push(in_namespace(namespace, Some(SERVER_CORE), move || f(&stop)));
        };
        run(Box::new(move |stop| accept(&tcp_echo, stop, echo_stream)));
        run(Box::new(move |stop| echo_datagrams(&udp_echo, stop)));
        run(Box::new({
            let sunk = sunk.clone();
            move |stop| accept(&tcp_sink, stop, move |stream, stop| sink_stream(stream, stop, &sunk))
        }));
        run(Box::new({
            let packets = packets.clone();
            move |stop| sink_datagrams(&udp_sink, stop, &packets)
        }));
        Ok(Self { stop, sunk, packets, threads })
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

fn accept(
    listener: &TcpListener,
    stop: &AtomicBool,
    mut serve: impl FnMut(TcpStream, &AtomicBool) -> io::Result<()>,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(READ_TIMEOUT))?;
                // A client that resets ends its own connection only.
                let _ = serve(stream, stop);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(1)),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn timed_out(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn echo_stream(mut stream: TcpStream, stop: &AtomicBool) -> io::Result<()> {
    let mut byte = [0u8; 64];
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut byte) {
            Ok(0) => return Ok(()),
            Ok(n) => stream.write_all(&byte[..n])?,
            Err(e) if timed_out(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn echo_datagrams(socket: &UdpSocket, stop: &AtomicBool) -> io::Result<()> {
    socket.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut buffer = [0u8; 2048];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv_from(&mut buffer) {
            Ok((n, from)) => {
                let _ = socket.send_to(&buffer[..n], from);
            }
            Err(e) if timed_out(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn sink_stream(mut stream: TcpStream, stop: &AtomicBool, sunk: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0u8; 1 << 18];
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                sunk.fetch_add(n as u64, Ordering::Relaxed);
            }
            Err(e) if timed_out(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn sink_datagrams(socket: &UdpSocket, stop: &AtomicBool, packets: &AtomicU64) -> io::Result<()> {
    socket.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut buffer = [0u8; 2048];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(_) => {
                packets.fetch_add(1, Ordering::Relaxed);
            }
            Err(e) if timed_out(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// One byte there and back over one connection, times per second.
pub fn tcp_rr(pair: &Pair, time: Duration) -> io::Result<f64> {
    let to = SocketAddr::new(pair.address, ECHO_PORT);
    join(in_namespace(&pair.client, Some(CLIENT_CORE), move || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        rate(time, || {
            let mut byte = [1u8; 1];
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)
        })
    }))
}

/// One datagram there and back, times per second.
pub fn udp_rr(pair: &Pair, time: Duration) -> io::Result<f64> {
    let to = SocketAddr::new(pair.address, ECHO_PORT);
    join(in_namespace(&pair.client, Some(CLIENT_CORE), move || {
        let socket = connected(to)?;
        rate(time, || {
            let mut byte = [1u8; 1];
            socket.send(&byte)?;
            socket.recv(&mut byte).map(drop)
        })
    }))
}

/// Small datagrams that arrive, per second, with the sender at full speed.
pub fn udp_pps(pair: &Pair, server: &Server, time: Duration) -> io::Result<f64> {
    let to = SocketAddr::new(pair.address, SINK_PORT);
    let before = server.packets.load(Ordering::Relaxed);
    let began = Instant::now();
    join(in_namespace(&pair.client, Some(CLIENT_CORE), move || {
        let socket = connected(to)?;
        let payload = [0u8; 64];
        while began.elapsed() < time {
            for _ in 0..64 {
                // A full queue drops, which is what is being measured.
                let _ = socket.send(&payload);
            }
        }
        Ok(())
    }))?;
    let seconds = began.elapsed().as_secs_f64();
    Ok((server.packets.load(Ordering::Relaxed) - before) as f64 / seconds)
}

/// Bytes of one stream that arrive, in Gbit/s.
pub fn tcp_gbps(pair: &Pair, server: &Server, time: Duration) -> io::Result<f64> {
    let to = SocketAddr::new(pair.address, SINK_PORT);
    let before = server.sunk.load(Ordering::Relaxed);
    let began = Instant::now();
    join(in_namespace(&pair.client, Some(CLIENT_CORE), move || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        let buffer = vec![0u8; 1 << 17];
        while began.elapsed() < time {
            stream.write_all(&buffer)?;
        }
        Ok(())
    }))?;
    let seconds = began.elapsed().as_secs_f64();
    Ok((server.sunk.load(Ordering::Relaxed) - before) as f64 * 8.0 / seconds / 1e9)
}

fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    Ok(socket)
}

fn rate(time: Duration, mut once: impl FnMut() -> io::Result<()>) -> io::Result<f64> {
    let began = Instant::now();
    let mut n = 0u64;
    while began.elapsed() < time {
        for _ in 0..16 {
            once()?;
        }
        n += 16;
    }
    Ok(n as f64 / began.elapsed().as_secs_f64())
}
