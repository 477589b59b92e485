//! The one task that talks to the control plane: keeps a stream, and carries between it, [`State`] and the handles.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::core::v3::node::UserAgentVersionType;
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};

use super::link::{Event, Link};
use super::state::{Full, State};
use super::{Command, DiscoveryConfig, NodeInfo, Shared, Unresolved};
use crate::backoff;
use crate::channel::Connector;
use crate::model::{Resolution, Target};
use crate::registration::Registration;
use crate::xds::{Kind, MESH};

/// How often unused targets are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// Answers taken in before others have their turn.
const AT_ONCE: usize = 16;

type Waiter = oneshot::Sender<Result<Resolution, Unresolved>>;

struct Driver {
    connector: Connector,
    node: NodeInfo,
    shared: Arc<Shared>,
    state: State,
    link: Link,
    /// Who waits for the first answer about a target.
    waiting: HashMap<Target, Vec<Waiter>>,
    registration: watch::Receiver<Option<Registration>>,
    withdrawn: bool,
    /// The node changed while a stream was being opened.
    untold: bool,
    /// Who waits until the withdrawal was read.
    withdrawing: Vec<oneshot::Sender<()>>,
    /// Attempts since the control plane last said anything.
    failures: u32,
}

/// Runs until the last handle is gone.
pub(super) async fn run(config: DiscoveryConfig, shared: Arc<Shared>, mut commands: mpsc::Receiver<Command>) {
    let mut registration = config.registration.clone();
    let mut rotations = config.connector.rotations();
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut driver = Driver {
        connector: config.connector,
        node: config.node,
        shared,
        state: State::default(),
        link: Link::Idle,
        waiting: HashMap::new(),
        registration: config.registration,
        withdrawn: false,
        untold: false,
        withdrawing: Vec::new(),
        failures: 0,
    };
    driver.open();
    loop {
        // In no order: each branch is rare beside what it does. Each is safe to lose: queues, timers, and a link that
        // keeps its own future.
        tokio::select! {
            command = commands.recv() => match command {
                Some(command) => driver.obey(command),
                None => return,
            },
            // Without a sender it stays as it is; the branch is then never taken.
            Ok(()) = registration.changed() => driver.tell_node(),
            () = rotations.next() => driver.reopen(),
            _ = sweep.tick() => driver.sweep(),
            event = driver.link.next() => driver.on_link_now(event),
        }
        driver.settle();
    }
}

impl Driver {
    fn obey(&mut self, command: Command) {
        match command {
            Command::Resolve { target, answer } => match self.state.want(&target, now()) {
                Err(Full) => drop(answer.send(Err(Unresolved::TooMany))),
                Ok(()) => match self.state.answer(&target) {
                    Some(known) => drop(answer.send(Ok(known.clone()))),
                    None => self.waiting.entry(target).or_default().push(answer),
                },
            },
            Command::Withdraw { done } => {
                self.withdrawn = true;
                self.withdrawing.push(done);
                self.tell_node();
            }
        }
    }

    /// Sends the node as it is now. While a stream is being opened it has to wait, the first message is on its way.
    fn tell_node(&mut self) {
        self.untold = !self.link.is_up();
        if self.untold {
            return;
        }
        // A subscription is always answered, and in order: the answer shows that the node in it was read.
        let subscribe = if self.withdrawn { vec![MESH.to_string()] } else { Vec::new() };
        self.send(DeltaDiscoveryRequest {
            node: Some(self.node()),
            type_url: Kind::Listener.type_url().to_string(),
            resource_names_subscribe: subscribe,
            ..DeltaDiscoveryRequest::default()
        });
    }

    /// What happened, and what else has by now: a destination's parts are told one right after the other, and what follows
    /// from all of them is looked at once.
    fn on_link_now(&mut self, event: Event) {
        self.on_link(event);
        for _ in 1..AT_ONCE {
            // Nobody is woken for what is not there yet: the task asks again before it rests.
            let Some(event) = self.link.next().now_or_never() else { return };
            self.on_link(event);
        }
    }

    fn on_link(&mut self, event: Event) {
        match event {
            Event::Retry => self.open(),
            Event::Opened if self.untold => self.tell_node(),
            Event::Opened => {}
            Event::Down(reason) => self.down(&reason),
            Event::Answer(response) => {
                self.heard();
                let connector = &self.connector;
                let verdict = self.state.receive(*response, &mut |pem| connector.install_bundle(pem));
                if let Some(reason) = verdict.refused {
                    tracing::warn!(%reason, "the control plane sent something that is not valid; the last good state stays");
                    self.shared.status.send_modify(|status| {
                        status.refused += 1;
                        status.last_error = Some(reason.into());
                    });
                }
                self.send(verdict.reply);
                if verdict.told_mesh {
                    for done in self.withdrawing.drain(..) {
                        let _ = done.send(());
                    }
                }
            }
        }
    }

    /// Whatever happened: publish what is known now, answer who waits, and ask for what is wanted now.
    fn settle(&mut self) {
        if self.state.assemble() {
            self.shared.publish(self.state.snapshot());
            let state = &self.state;
            self.waiting.retain(|target, waiters| match state.answer(target) {
                Some(answer) => {
                    waiters.drain(..).for_each(|waiter| drop(waiter.send(Ok(answer.clone()))));
                    false
                }
                None => true,
            });
        }
        if self.link.is_up() {
            for request in self.state.plan() {
                self.send(request);
            }
        }
    }

    fn sweep(&mut self) {
        self.shared.let_go();
        if self.state.sweep(now()) {
            self.shared.publish(self.state.snapshot());
        }
        self.waiting.retain(|_, waiters| {
            waiters.retain(|waiter| !waiter.is_closed());
            !waiters.is_empty()
        });
    }

    fn send(&mut self, request: DeltaDiscoveryRequest) {
        if let Err(reason) = self.link.send(request) {
            self.down(reason);
        }
    }

    fn open(&mut self) {
        let mut requests = self.state.begin();
        // The registration goes with the very first message.
        if let Some(first) = requests.first_mut() {
            first.node = Some(self.node());
        }
        self.untold = false;
        self.link = Link::open(&self.connector, requests);
    }

    /// Our certificate or bundle changed: the connection is to rest on what holds now.
    fn reopen(&mut self) {
        tracing::info!("the certificate or the trust bundle changed; connecting to the control plane anew");
        self.failures = 0;
        self.open();
    }

    fn heard(&mut self) {
        self.failures = 0;
        self.shared.status.send_if_modified(|status| {
            if status.connected {
                return false;
            }
            tracing::info!(control_plane = %self.connector, "connected to the control plane");
            status.connected = true;
            status.since = now();
            status.streams += 1;
            true
        });
    }

    fn down(&mut self, reason: &str) {
        self.failures = self.failures.saturating_add(1);
        let wait = backoff::wait(self.failures, rand::random());
        self.shared.status.send_modify(|status| {
            if status.connected {
                status.since = now();
            }
            status.connected = false;
            status.failures += 1;
            status.last_error = Some(reason.into());
        });
        let known = self.shared.snapshot.load().len();
        // Attempts come every few seconds: the 1st, 2nd, 4th, 8th failure is said.
        if self.failures.is_power_of_two() {
            tracing::warn!(
                control_plane = %self.connector, reason, failures = self.failures, known,
                "the control plane is away; what is known stays in force"
            );
        }
        self.link = Link::wait(wait);
    }

    fn node(&self) -> Node {
        let mut node = Node {
            id: self.node.id.clone(),
            cluster: self.node.cluster.clone(),
            user_agent_name: "sheetbend-proxy".to_string(),
            user_agent_version_type: Some(UserAgentVersionType::UserAgentVersion(
                env!("CARGO_PKG_VERSION").to_string(),
            )),
            ..Node::default()
        };
        if let Some(registration) = &*self.registration.borrow() {
            let withdrawn = self.withdrawn.then(|| registration.withdrawn());
            withdrawn.as_ref().unwrap_or(registration).put_into(&mut node);
        }
        node
    }
}

/// Tokio's clock, so that a test can stop it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
