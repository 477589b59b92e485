//! The Sheetbend data plane: the small proxy that sits beside every service.
//!
//! # The way of a request
//!
//! ```text
//!  app ──► listen ──► first_bytes ──► outbound ──► route ──► forward ──► upstream ══ mutual TLS ══► the peer's proxy
//!          accept     what is         who is it    known     attempts,   a shared
//!                     spoken?         for?         endpoints retries     connection
//!
//!  app ◄── upstream ◄── forward ◄── inbound ◄── client_hello ◄── listen ◄══ mutual TLS ══ the caller's proxy
//!          kept         one         who calls,  ours, the
//!          connection   attempt     may they?   app's, plain?
//! ```
//!
//! 1. [`listen`] accepts, and asks the kernel where a redirected connection was on its way to. A worker takes it over: a
//!    thread with a runtime and connections of its own, so that no lock is shared on this way.
//! 2. [`first_bytes`] reads just enough for [`detect`] to say what is spoken. Where the server has to speak first, both
//!    sides are listened to, and nobody waits for a timer. [`rewind`] gives back what was read.
//! 3. `outbound` finds whom a request is for: caught traffic by its original destination, explicit traffic by its
//!    authority. [`route`] holds what the control plane said of that destination; only the first request to a new
//!    destination ever asks for it. What is said later is made ready aside, and requests go on meanwhile.
//! 4. `forward` makes one attempt, or another where nothing can have happened yet: [`traffic`] chooses the endpoint and
//!    decides about the retry, [`upstream`] gives a connection to it, [`http`] takes care of headers, bodies and errors.
//! 5. `inbound` knows its caller by the certificate, asks whether they may call, and hands over to the app.
//! 6. What is no HTTP is carried by [`tcp`], byte for byte, with half-closes and resets.
//! 7. However it ends, it is reported once, to [`telemetry`]: metrics, the service graph, the access log.
//!
//! # The rooms
//!
//! | module | its one job |
//! |---|---|
//! | [`app`], `worker` | the one place that knows every part, order of start and stop; threads, each with its own pools |
//! | [`listen`], [`proc_net`], `sock_diag` | where connections come in, and whose they are |
//! | [`detect`], [`client_hello`] | pure: first bytes in, a verdict out |
//! | [`first_bytes`], [`rewind`] | reading a connection just far enough, and giving it back whole |
//! | `outbound`, `inbound`, [`tcp`] | app → mesh; mesh → app; opaque bytes |
//! | `here`, `in_process`, `refuse` | what leads back to ourselves: handed over within the process, or refused |
//! | `mtls`, [`rest`] | who calls, by mutual TLS; the end of what rests on a dropped root |
//! | `inbound_rules` | who may call, as the control plane says it now |
//! | `forward`, [`http`], `faults` | attempts and retries; hyper, and the one table from an error to an answer |
//! | `admission`, `room` | how often and how many at once: who passes, who waits, who is sent away |
//! | [`route`], [`policy`] | what the control plane said, ready for requests: which rule takes one, who may come, what is changed |
//! | [`traffic`] | pure: state and `now` in, a decision out: balancing, ejection, breakers, retries, limits, rates |
//! | [`upstream`] | endpoints that outlive a change of configuration, connections to them, mutual TLS |
//! | [`telemetry`], [`admin`], `observe`, `breakers` | what happened, and how to ask for it |
//!
//! # What always holds
//!
//! * A destination in the mesh is never dialed in plain, whatever fails.
//! * A request that may have had an effect is not sent twice, unless its method, its `Idempotency-Key` or its route says
//!   that this is as good as once.
//! * No decision makes an outage worse: retries have a budget, half of the endpoints serve whatever was seen of them, and
//!   where all of them fail, none is ejected.
//! * What one caller does (hangs up, stops reading, sends noise) costs no other caller a request.
//! * When the control plane is away, what is known goes on.

pub mod admin;
mod admission;
pub mod app;
mod breakers;
pub mod client_hello;
pub mod detect;
mod faults;
pub mod first_bytes;
mod forward;
mod here;
pub mod http;
mod in_process;
mod inbound;
mod inbound_rules;
pub mod listen;
mod mtls;
mod observe;
mod outbound;
pub mod policy;
pub mod proc_net;
mod refuse;
pub mod rest;
pub mod rewind;
mod room;
pub mod route;
mod sock_diag;
pub mod tcp;
pub mod telemetry;
pub mod traffic;
pub mod upstream;
mod worker;
