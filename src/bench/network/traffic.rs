//! Traffic between two namespaces: request-response, connections, packets, bytes.
//!
//! Plain blocking sockets on threads that entered their namespace once; the
//! client on one core and the server on another, the same for every subject.

pub mod cpu;
pub mod server;

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::Pid;

use server::{ECHO, ONCE, SINK};
pub use server::{PORT, Server};

const CLIENT_CORE: usize = 0;
const SERVER_CORE: usize = 1;
/// An answer that takes longer is an error: nothing here loses packets.
const PATIENCE: Duration = Duration::from_secs(2);

/// A client's namespace and the server it talks to.
#[derive(Clone, Debug)]
pub struct Pair {
    pub subject: String,
    pub client: PathBuf,
    pub server: PathBuf,
    pub address: IpAddr,
}

impl Pair {
    pub fn to(&self) -> SocketAddr {
        SocketAddr::new(self.address, PORT)
    }
}

/// What a client saw of one kind of exchange, done over and over.
#[derive(Clone, Copy, Debug)]
pub struct Timed {
    pub count: u64,
    pub per_second: f64,
    pub p99_us: f64,
    /// What the client's thread used of its processor.
    pub cpu: Duration,
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

pub fn join<R>(thread: JoinHandle<io::Result<R>>) -> io::Result<R> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the traffic thread panicked")))
}

fn as_client<R: Send + 'static>(namespace: &Path, f: impl FnOnce() -> io::Result<R> + Send + 'static) -> io::Result<R> {
    join(in_namespace(namespace, Some(CLIENT_CORE), f))
}

/// One byte there and back over one connection.
pub fn tcp_rr(client: &Path, to: SocketAddr, time: Duration) -> io::Result<Timed> {
    as_client(client, move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        timed(time, || {
            let mut byte = [ECHO; 1];
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)
        })
    })
}

/// A connection, one byte there and back, and its end; to each of `to` in turn.
pub fn tcp_crr(client: &Path, to: Vec<SocketAddr>, time: Duration) -> io::Result<Timed> {
    as_client(client, move || {
        let mut turn = to.iter().cycle();
        timed(time, || {
            let Some(to) = turn.next() else { return Err(io::Error::other("nobody to connect to")) };
            let mut stream = TcpStream::connect(to)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut byte = [ONCE; 1];
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
            match stream.read(&mut byte)? {
                0 => Ok(()),
                _ => Err(io::Error::other("more than was asked for")),
            }
        })
    })
}

/// One datagram there and back.
pub fn udp_rr(client: &Path, to: SocketAddr, time: Duration) -> io::Result<Timed> {
    as_client(client, move || {
        let socket = connected(to)?;
        timed(time, || {
            let mut byte = [ECHO; 1];
            socket.send(&byte)?;
            socket.recv(&mut byte).map(drop)
        })
    })
}

fn sum(of: &[&Server], what: impl Fn(&server::Seen) -> &AtomicU64) -> u64 {
    of.iter().map(|server| what(&server.seen).load(Ordering::Relaxed)).sum()
}

/// Small datagrams that arrive at any of the servers, per second, with the
/// sender at full speed.
pub fn udp_pps(client: &Path, to: SocketAddr, servers: &[&Server], time: Duration) -> io::Result<f64> {
    let before = sum(servers, |seen| &seen.packets);
    let began = Instant::now();
    as_client(client, move || {
        let socket = connected(to)?;
        let payload = [SINK; 64];
        while began.elapsed() < time {
            for _ in 0..64 {
                // A full queue drops, which is what is being measured.
                let _ = socket.send(&payload);
            }
        }
        Ok(())
    })?;
    let seconds = began.elapsed().as_secs_f64();
    Ok((sum(servers, |seen| &seen.packets) - before) as f64 / seconds)
}

/// Bytes of one stream that arrive, in Gbit/s.
pub fn tcp_gbps(client: &Path, to: SocketAddr, servers: &[&Server], time: Duration) -> io::Result<f64> {
    let before = sum(servers, |seen| &seen.bytes);
    let began = Instant::now();
    as_client(client, move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        let buffer = vec![SINK; 1 << 17];
        while began.elapsed() < time {
            stream.write_all(&buffer)?;
        }
        Ok(())
    })?;
    let seconds = began.elapsed().as_secs_f64();
    Ok((sum(servers, |seen| &seen.bytes) - before) as f64 * 8.0 / seconds / 1e9)
}

fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn timed(time: Duration, mut once: impl FnMut() -> io::Result<()>) -> io::Result<Timed> {
    let mut took: Vec<u32> = Vec::with_capacity(1 << 16);
    let cpu = cpu::of_this_thread();
    let began = Instant::now();
    let mut last = began;
    // At least once.
    loop {
        once()?;
        let now = Instant::now();
        took.push(u32::try_from((now - last).as_nanos()).unwrap_or(u32::MAX));
        last = now;
        if last - began >= time {
            break;
        }
    }
    let cpu = cpu::of_this_thread().saturating_sub(cpu);
    // Less than the length.
    let at = took.len() * 99 / 100;
    let (_, p99, _) = took.select_nth_unstable(at);
    Ok(Timed {
        p99_us: f64::from(*p99) / 1e3,
        count: took.len() as u64,
        per_second: took.len() as f64 / (last - began).as_secs_f64(),
        cpu,
    })
}
